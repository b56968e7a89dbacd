// Eight counters at a time, AVX2 and FMA: the operations of noise_avx512.h on registers of half the width.
#pragma once
#include <immintrin.h>

namespace {

struct Vector {
    using Words = __m256i;
    using Wide = __m256i;
    using Floats = __m256;
    static constexpr int lanes = 8;

    static Words load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Wide load64(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Words all(uint32_t v) { return _mm256_set1_epi32(int(v)); }
    static Words permute(Words v, const int32_t* order) {
        return _mm256_permutevar8x32_epi32(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(order)));
    }
    static Wide upper(Words v) { return _mm256_srli_epi64(v, 32); }
    static Wide multiply(Wide v, Wide factor) { return _mm256_mul_epu32(v, factor); }
    static Wide add64(Wide a, Wide b) { return _mm256_add_epi64(a, b); }
    static Wide all64(uint64_t v) { return _mm256_set1_epi64x(int64_t(v)); }
    static Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
    static Words exclusive_or(Words a, Words b, Words c) { return exclusive_or(exclusive_or(a, b), c); }
    static Words interleave(Wide even, Wide odd) {
        return _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
    }
    // the same of their upper halves
    static Words interleave_upper(Wide even, Wide odd) {
        return _mm256_blend_epi32(odd, _mm256_shuffle_epi32(even, 0xF5), 0x55);
    }

    static Floats constant(float v) { return _mm256_set1_ps(v); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats fma_of_any(Floats a, Floats b, Floats c) { return fma(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats root(Floats v) { return _mm256_sqrt_ps(v); }
    static Floats from_signed(Words v) { return _mm256_cvtepi32_ps(v); }
    static Floats bits(Words v) { return _mm256_castsi256_ps(v); }
    static Words bits(Floats v) { return _mm256_castps_si256(v); }
    static Words subtract(Words a, Words b) { return _mm256_sub_epi32(a, b); }
    static Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
    static Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
    template <int n> static Words left(Words v) { return _mm256_slli_epi32(v, n); }
    template <int n> static Words right(Words v) { return _mm256_srli_epi32(v, n); }
    template <int n> static Words right_signed(Words v) { return _mm256_srai_epi32(v, n); }
    static void swap(Words r, Floats& a, Floats& b) {
        const Floats swapped = bits(left<30>(r));  // blendv looks at the sign bit
        const Floats kept = a;
        a = _mm256_blendv_ps(a, b, swapped);
        b = _mm256_blendv_ps(b, kept, swapped);
    }
    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static void store(uint32_t* p, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Floats low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
    static Floats high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
    static Floats low_pairs(Floats a, Floats b) {
        return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
    }
    static Floats high_pairs(Floats a, Floats b) {
        return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
    }
};

}  // namespace
