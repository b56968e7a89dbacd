#include "fastdiff.h"

#include <stdlib.h>
#include <string.h>

fastdiff_for fastdiff_parallel_for = nullptr;

void* fastdiff_scratch() {
    struct Kept {
        void* memory = nullptr;
        ~Kept() { free(memory); }
    };
    static thread_local Kept kept;
    if (!kept.memory && posix_memalign(&kept.memory, 64, size_t(kScratch)) != 0) kept.memory = nullptr;
    return kept.memory;
}

namespace {

using Run = int (*)(int, const int64_t*, bool);
struct Level {
    const char* name;
    Run run;
};

// The instruction sets that this machine has, the plainest first; how many.
int usable(Level* levels) {
    int n = 0;
    levels[n++] = {"plain", fastdiff_run_plain};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        levels[n++] = {"avx2", fastdiff_run_avx2};
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512bw"))
            levels[n++] = {"avx512", fastdiff_run_avx512};
    }
#endif
    return n;
}

// Written by fastdiff_start without a barrier: by the first import, and by tests, while no other thread is in the library.
Level current = {nullptr, nullptr};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Takes torch's loop over threads, and the instruction set to use (null: the best here). Returns its name, or null.
const char* fastdiff_start(fastdiff_for parallel_for, const char* instruction_set) {
    Level levels[3];
    const int n = usable(levels);
    fastdiff_parallel_for = parallel_for;
    for (int i = n - 1; i >= 0; --i)
        if (instruction_set == nullptr || strcmp(levels[i].name, instruction_set) == 0) {
            current = levels[i];
            return current.name;
        }
    return nullptr;
}

// Whether the compiler kept the tests for numbers that are not finite.
int fastdiff_sees(double value) { return value * 0 != 0; }

// The sources that this library was built from (a hash of them).
const char* fastdiff_sources() { return FASTDIFF_SOURCES; }

int fastdiff_run(int operation, const int64_t* arguments, int wide) { return current.run(operation, arguments, wide != 0); }
}
#pragma GCC visibility pop
