// The library's interface: a plain C ABI, called from fastdiff/execution/cpu.py.
#pragma once
#include <stdint.h>

// In the order of OPERATIONS in fastdiff/execution/cpu.py (a test compares them).
enum Operation {
    kNormal, kRademacher, kWords, kStep, kMeasureLangevin, kPerturb, kDsmLoss, kDsmLossBackward, kTimestepEmbedding, kProbeDot,
    kRkError, kSumOfSquares, kAdam, kWinogradWeights, kWinograd, kGroupNormSilu
};
// As fastdiff/execution/cpu.py words them.
enum Result { kDone, kRowOutOfRange, kWrongDtype, kWrongCursor, kWrongTable, kNoMemory, kThreads };
constexpr int kMaxStages = 16, kMaxTensors = 32;

typedef void (*fastdiff_range)(int64_t begin, int64_t end, void* context);
typedef int (*fastdiff_for)(int64_t begin, int64_t end, int64_t grain, fastdiff_range range, void* context);

// torch's own loop over threads (torch_parallel_for), or null: then everything runs on the caller's thread.
extern fastdiff_for fastdiff_parallel_for;

// The calling thread's buffers, kScratch bytes, which stay until it ends; null: there is no memory. They are not on its stack,
// which may be small: a server's worker has 128 KiB or less.
constexpr int64_t kScratch = 14 * 2048 * 8 + 64;
void* fastdiff_scratch();

// One operation on one instruction set; `wide`: a float64 state.
int fastdiff_run_plain(int operation, const int64_t* arguments, bool wide);
int fastdiff_run_avx2(int operation, const int64_t* arguments, bool wide);
int fastdiff_run_avx512(int operation, const int64_t* arguments, bool wide);
