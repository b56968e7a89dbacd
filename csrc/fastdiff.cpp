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

#if defined(__x86_64__)
#define WORDS_(x) #x
#define WORDS(x) WORDS_(x)
#define USES(macro, name) if (WORDS(macro)[0] == '1' && !__builtin_cpu_supports(name)) return name
#endif
const char* lacking() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    USES(__SSE3__, "sse3");
    USES(__SSSE3__, "ssse3");
    USES(__SSE4_1__, "sse4.1");
    USES(__SSE4_2__, "sse4.2");
    USES(__POPCNT__, "popcnt");
    USES(__AVX__, "avx");
    USES(__FMA__, "fma");
    USES(__FMA4__, "fma4");
    USES(__XOP__, "xop");
    USES(__BMI__, "bmi");
    USES(__BMI2__, "bmi2");
    USES(__AVX2__, "avx2");
    USES(__AVX512F__, "avx512f");
    USES(__AVX512DQ__, "avx512dq");
    USES(__AVX512VL__, "avx512vl");
    USES(__AVX512BW__, "avx512bw");
    USES(__AVX512VBMI__, "avx512vbmi");
#endif
    return nullptr;
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

// An instruction set that the flags of the build (-march=native, say) let every file use and this processor lacks, or null.
const char* fastdiff_lacks() { return lacking(); }

// The sources that this library was built from (a hash of them).
const char* fastdiff_sources() { return FASTDIFF_SOURCES; }

int fastdiff_run(int operation, const int64_t* arguments, int wide) { return current.run(operation, arguments, wide != 0); }
}
#pragma GCC visibility pop
