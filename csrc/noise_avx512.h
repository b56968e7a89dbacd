// Sixteen counters at a time, AVX-512: Philox in the eight 64-bit lanes of two registers, Box-Muller in sixteen 32-bit lanes.
#pragma once
#include <immintrin.h>

namespace {

struct Vector {
    using Words = __m512i;  // 32-bit lanes
    using Wide = __m512i;   // 64-bit lanes whose upper halves may hold anything
    using Floats = __m512;
    static constexpr int lanes = 16;

    static Words load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static Wide load64(const uint64_t* p) { return _mm512_loadu_si512(p); }
    static Words all(uint32_t v) { return _mm512_set1_epi32(int(v)); }
    static Words permute(Words v, const int32_t* order) { return _mm512_permutexvar_epi32(_mm512_loadu_si512(order), v); }
    static Wide upper(Words v) { return _mm512_srli_epi64(v, 32); }
    static Wide multiply(Wide v, Wide factor) { return _mm512_mul_epu32(v, factor); }
    static Wide add64(Wide a, Wide b) { return _mm512_add_epi64(a, b); }
    static Wide all64(uint64_t v) { return _mm512_set1_epi64(int64_t(v)); }
    static Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
    static Words exclusive_or(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
    // lower halves of even in the even lanes, of odd in the odd ones
    static Words interleave(Wide even, Wide odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
    // the same of their upper halves
    static Words interleave_upper(Wide even, Wide odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }

    static Floats constant(float v) { return _mm512_set1_ps(v); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats fma_of_any(Floats a, Floats b, Floats c) { return fma(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats root(Floats v) { return _mm512_sqrt_ps(v); }
    static Floats from_signed(Words v) { return _mm512_cvtepi32_ps(v); }
    static Floats bits(Words v) { return _mm512_castsi512_ps(v); }
    static Words bits(Floats v) { return _mm512_castps_si512(v); }
    static Words subtract(Words a, Words b) { return _mm512_sub_epi32(a, b); }
    static Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
    static Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
    template <int n> static Words left(Words v) { return _mm512_slli_epi32(v, n); }
    template <int n> static Words right(Words v) { return _mm512_srli_epi32(v, n); }
    template <int n> static Words right_signed(Words v) { return _mm512_srai_epi32(v, n); }
    // a and b change places in lanes where bit 1 of r is set
    static void swap(Words r, Floats& a, Floats& b) {
        const __mmask16 swapped = _mm512_test_epi32_mask(r, all(2));
        const Floats kept = a;
        a = _mm512_mask_mov_ps(a, swapped, b);
        b = _mm512_mask_mov_ps(b, swapped, kept);
    }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static void store(uint32_t* p, Words v) { _mm512_storeu_si512(p, v); }
    static Floats low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
    static Floats high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
    static Floats low_pairs(Floats a, Floats b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
    static Floats high_pairs(Floats a, Floats b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
};

}  // namespace
