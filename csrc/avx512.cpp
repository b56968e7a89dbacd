#include <stdint.h>
#include "noise_avx512.h"
#include "kernels.h"

int fastdiff_run_avx512(int operation, const int64_t* arguments, bool wide) { return run(operation, arguments, wide); }
