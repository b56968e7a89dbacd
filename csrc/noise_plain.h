// Four counters at a time in the compiler's own vectors: any machine that gcc or clang know (SSE2, NEON).
#pragma once
#include <math.h>

namespace {

struct Vector {
    using Words = uint32_t __attribute__((vector_size(16)));
    using Signed = int32_t __attribute__((vector_size(16)));
    using Wide = uint64_t __attribute__((vector_size(16)));
    using Floats = float __attribute__((vector_size(16)));
    static constexpr int lanes = 4;

    template <class To, class From> static To as(From v) {
        To out;
        __builtin_memcpy(&out, &v, sizeof out);
        return out;
    }
    static Words load(const uint32_t* p) {
        Words v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static Wide load64(const uint64_t* p) {
        Wide v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static Words all(uint32_t v) { return Words{v, v, v, v}; }
    static Words permute(Words v, const int32_t* order) { return Words{v[order[0]], v[order[1]], v[order[2]], v[order[3]]}; }
    static Wide upper(Words v) { return as<Wide>(v) >> 32; }
    static Wide upper(Wide v) { return v >> 32; }
    static Wide multiply(Wide v, Wide factor) { return (v & 0xffffffffu) * (factor & 0xffffffffu); }
    static Wide add64(Wide a, Wide b) { return a + b; }
    static Wide all64(uint64_t v) { return Wide{v, v}; }
    static Words exclusive_or(Words a, Words b) { return a ^ b; }
    static Words exclusive_or(Words a, Words b, Words c) { return a ^ b ^ c; }
    static Wide exclusive_or(Wide a, Wide b) { return a ^ b; }
    static Wide exclusive_or(Wide a, Words b) { return a ^ as<Wide>(b); }
    static Wide exclusive_or(Wide a, Wide b, Words c) { return a ^ b ^ as<Wide>(c); }
    static Wide exclusive_or(Wide a, Words b, Words c) { return a ^ as<Wide>(b ^ c); }
    static Words interleave(Wide even, Wide odd) { return as<Words>((even & 0xffffffffu) | (odd << 32)); }
    // the same of their upper halves
    static Words interleave_upper(Wide even, Wide odd) {
        return as<Words>((even >> 32) | (odd & 0xffffffff00000000u));
    }

    static Floats constant(float v) { return Floats{v, v, v, v}; }
    static Floats fma(Floats a, Floats b, Floats c) {
        Floats out;
#if defined(__FP_FAST_FMAF)
        for (int i = 0; i < lanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
        // where the machine has none: twice rounded, which changes nothing in FDN1 (see fastdiff/execution/noise.py)
        using Doubles = double __attribute__((vector_size(32)));
        const Doubles x = __builtin_convertvector(a, Doubles), y = __builtin_convertvector(b, Doubles);
        out = __builtin_convertvector(x * y + __builtin_convertvector(c, Doubles), Floats);
#endif
        return out;
    }
    // of any numbers, not those of FDN1 alone: always rounded once
    static Floats fma_of_any(Floats a, Floats b, Floats c) {
        Floats out;
        for (int i = 0; i < lanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
        return out;
    }
    static Floats multiply(Floats a, Floats b) { return a * b; }
    static Floats subtract(Floats a, Floats b) { return a - b; }
    static Floats root(Floats v) {
        Floats out;
        for (int i = 0; i < lanes; ++i) out[i] = sqrtf(v[i]);
        return out;
    }
    static Floats from_signed(Words v) { return __builtin_convertvector(as<Signed>(v), Floats); }
    static Floats bits(Words v) { return as<Floats>(v); }
    static Words bits(Floats v) { return as<Words>(v); }
    static Words subtract(Words a, Words b) { return a - b; }
    static Words add(Words a, Words b) { return a + b; }
    static Words both(Words a, Words b) { return a & b; }
    template <int n> static Words left(Words v) { return v << n; }
    template <int n> static Words right(Words v) { return v >> n; }
    template <int n> static Words right_signed(Words v) { return as<Words>(as<Signed>(v) >> n); }
    static void swap(Words r, Floats& a, Floats& b) {
        const Words swapped = as<Words>((r & 2u) != 0u), difference = (as<Words>(a) ^ as<Words>(b)) & swapped;
        a = as<Floats>(as<Words>(a) ^ difference);
        b = as<Floats>(as<Words>(b) ^ difference);
    }
    static Floats load(const float* p) {
        Floats v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
    static void store(uint32_t* p, Words v) { __builtin_memcpy(p, &v, sizeof v); }
    static Floats low(Floats a, Floats b) { return Floats{a[0], b[0], a[1], b[1]}; }
    static Floats high(Floats a, Floats b) { return Floats{a[2], b[2], a[3], b[3]}; }
    static Floats low_pairs(Floats a, Floats b) { return Floats{a[0], a[1], b[0], b[1]}; }
    static Floats high_pairs(Floats a, Floats b) { return Floats{a[2], a[3], b[2], b[3]}; }
};

}  // namespace
