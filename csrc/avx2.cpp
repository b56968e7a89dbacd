#include <stdint.h>
#include "noise_avx2.h"
#include "kernels.h"

int fastdiff_run_avx2(int operation, const int64_t* arguments, bool wide) { return run(operation, arguments, wide); }
