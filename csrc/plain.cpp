#include <stdint.h>
#include "noise_plain.h"
#include "kernels.h"

int fastdiff_run_plain(int operation, const int64_t* arguments, bool wide) { return run(operation, arguments, wide); }
