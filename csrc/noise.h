// FDN1, fastdiff's random numbers: Philox4x32-10 and Box-Muller in exactly rounded steps (fastdiff/execution/noise.py).
//
// A `Vector` of L lanes makes L counters' words at once; which counter stands in which lane (`Order`) is chosen so that the
// normals come out of a transposition within 128 bits in the order in which they are stored.
#pragma once
#include <stdint.h>
#include <string.h>

#include "constants.h"

namespace {

constexpr uint32_t kMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};

struct Source {  // of one operation's noise
    uint32_t key[2][10];
    uint32_t draw, stream;

    Source(uint64_t seed, uint32_t draw, uint32_t stream) : draw(draw), stream(stream) {
        for (int round = 0; round < 10; ++round) {
            key[0][round] = uint32_t(seed) + uint32_t(round) * kWeyl[0];
            key[1][round] = uint32_t(seed >> 32) + uint32_t(round) * kWeyl[1];
        }
    }
};

// How many of a counter's four numbers are stored, side by side.
enum class Keep { one = 1, two = 2, four = 4 };

// The counter, of L consecutive ones, whose numbers stand in each 32-bit lane.
template <Keep keep> struct Order {
    int32_t counter[Vector::lanes];

    constexpr Order() : counter() {
        constexpr int L = Vector::lanes;
        for (int lane = 0; lane < L; ++lane) {
            const int group = lane / 4, place = lane % 4;
            counter[lane] = keep == Keep::four  ? place * (L / 4) + group
                            : keep == Keep::two ? place / 2 * (L / 2) + 2 * group + place % 2
                                                : lane;
        }
    }
};
template <Keep keep> constexpr Order<keep> kOrder{};

using Wide = Vector::Wide;
using Words = Vector::Words;
using Floats = Vector::Floats;

// Groups of L counters whose numbers are made side by side: each operation waits for the one before it, and a processor looks
// only so far ahead for others to do meanwhile.
constexpr int kGroups = 2;

// Rounds first … 9 of `groups` groups: two halves each of c0 … c3, the even lanes and the odd ones, to four vectors of words each.
template <int groups> inline __attribute__((always_inline)) void philox_rounds(
    int first, Wide* c0, Wide* c1, Wide* c2, Wide* c3, const Source& source, Words* r) {
    const Wide m0 = Vector::all64(kMultiplier[0]), m1 = Vector::all64(kMultiplier[1]);
#pragma GCC unroll 10
    for (int round = first; round < 9; ++round) {
        const Words k0 = Vector::all(source.key[0][round]), k1 = Vector::all(source.key[1][round]);
#pragma GCC unroll 8
        for (int half = 0; half < 2 * groups; ++half) {
            const Wide p0 = Vector::multiply(c0[half], m0), p1 = Vector::multiply(c2[half], m1);
            c0[half] = Vector::exclusive_or(Vector::upper(p1), c1[half], k0);
            c1[half] = p1;
            c2[half] = Vector::exclusive_or(Vector::upper(p0), c3[half], k1);
            c3[half] = p0;
        }
    }
    // the last round on interleaved lanes: half the exclusive ors
    const Words k0 = Vector::all(source.key[0][9]), k1 = Vector::all(source.key[1][9]);
#pragma GCC unroll 4
    for (int group = 0; group < groups; ++group, r += 4) {
        const int even = 2 * group, odd = even + 1;
        const Wide even0 = Vector::multiply(c0[even], m0), odd0 = Vector::multiply(c0[odd], m0);
        const Wide even1 = Vector::multiply(c2[even], m1), odd1 = Vector::multiply(c2[odd], m1);
        r[0] = Vector::exclusive_or(Vector::interleave_upper(even1, odd1), Vector::interleave(c1[even], c1[odd]), k0);
        r[1] = Vector::interleave(even1, odd1);
        r[2] = Vector::exclusive_or(Vector::interleave_upper(even0, odd0), Vector::interleave(c3[even], c3[odd]), k1);
        r[3] = Vector::interleave(even0, odd0);
    }
}

// The words of L counters, each with its own quad and sample, in the lanes' order.
inline __attribute__((always_inline)) void philox(Words quads, Words samples, const Source& source, Words r[4]) {
    Wide c0[2] = {Wide(quads), Vector::upper(quads)}, c2[2] = {Wide(samples), Vector::upper(samples)};
    const Wide draw = Wide(Vector::all(source.draw)), stream = Wide(Vector::all(source.stream));
    Wide c1[2] = {draw, draw}, c3[2] = {stream, stream};
    philox_rounds<1>(0, c0, c1, c2, c3, source, r);
}

// kMultiplier[0] * counter for the counters of the even lanes, and of the odd ones.
template <Keep keep> struct LaneProducts {
    uint64_t of[2][Vector::lanes / 2];

    constexpr LaneProducts() : of() {
        for (int lane = 0; lane < Vector::lanes; ++lane)
            of[lane % 2][lane / 2] = uint64_t(kMultiplier[0]) * uint64_t(Order<keep>().counter[lane]);
    }
};
template <Keep keep> constexpr LaneProducts<keep> kLaneProducts{};

// Consecutive quads of one sample: the first round has one product a counter, which an addition carries on, and the
// second one; the others are the same for all.
template <Keep keep> struct OneSample {
    Wide product[2];  // kMultiplier[0] * quad
    uint32_t first_c0, first_c1, second_c3;
    uint64_t second_p0;

    OneSample(uint32_t quad, uint32_t sample, const Source& source) {
        const Wide first = Vector::all64(uint64_t(kMultiplier[0]) * quad);
        product[0] = Vector::add64(first, Vector::load64(kLaneProducts<keep>.of[0]));
        product[1] = Vector::add64(first, Vector::load64(kLaneProducts<keep>.of[1]));
        const uint64_t p1 = uint64_t(kMultiplier[1]) * sample;
        first_c0 = uint32_t(p1 >> 32) ^ source.draw ^ source.key[0][0];
        first_c1 = uint32_t(p1);
        second_p0 = uint64_t(kMultiplier[0]) * first_c0;
        second_c3 = uint32_t(second_p0);
    }

    // The words of the next `groups` groups.
    template <int groups> inline __attribute__((always_inline)) void next(const Source& source, Words* r) {
        const Wide m1 = Vector::all64(kMultiplier[1]);
        const Wide step = Vector::all64(uint64_t(kMultiplier[0]) * Vector::lanes);
        const Words k1 = Vector::all(source.stream ^ source.key[1][0]);
        const Words second0 = Vector::all(first_c1 ^ source.key[0][1]);
        const Words second1 = Vector::all(uint32_t(second_p0 >> 32) ^ source.key[1][1]);
        Wide c0[2 * groups], c1[2 * groups], c2[2 * groups], c3[2 * groups];
#pragma GCC unroll 8
        for (int half = 0; half < 2 * groups; ++half) {
            Wide& p0 = product[half % 2];
            const Wide first_c2 = Vector::exclusive_or(Vector::upper(p0), k1);
            const Wide p1 = Vector::multiply(first_c2, m1);
            c0[half] = Vector::exclusive_or(Vector::upper(p1), second0);
            c1[half] = p1;
            c2[half] = Vector::exclusive_or(p0, second1);
            c3[half] = Wide(Vector::all(second_c3));
            p0 = Vector::add64(p0, step);
        }
        philox_rounds<groups>(2, c0, c1, c2, c3, source, r);
    }
};

// The polynomial in x of n vectors.
template <int n, int terms> inline __attribute__((always_inline)) void horner(
    const Floats* x, const float (&coefficients)[terms], Floats* p) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) p[k] = Vector::constant(coefficients[0]);
#pragma GCC unroll 8
    for (int i = 1; i < terms; ++i)
#pragma GCC unroll 8
        for (int k = 0; k < n; ++k) p[k] = Vector::fma(p[k], x[k], Vector::constant(coefficients[i]));
}

// sqrt(-2 ln u), u = (r/2 + 1/2) 2^-31, for the first of n pairs of words.
template <int n> inline __attribute__((always_inline)) void radius(const Words* r, Floats* out) {
    const Words threshold = Vector::all(0x3F2AAAABu);
    Floats exponent[n], f[n], p[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
        const Floats u = Vector::fma(
            Vector::from_signed(Vector::template right<1>(r[2 * k])), Vector::constant(0x1p-31f), Vector::constant(0x1p-32f));
        const Words above = Vector::subtract(Vector::bits(u), threshold);
        exponent[k] = Vector::from_signed(Vector::template right_signed<23>(above));
        const Words mantissa = Vector::add(Vector::both(above, Vector::all(0x007FFFFFu)), threshold);
        f[k] = Vector::subtract(Vector::bits(mantissa), Vector::constant(1.0f));
    }
    horner<n>(f, kLog, p);
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
        const Floats log = Vector::multiply(p[k], f[k]);
        out[k] = Vector::root(Vector::fma(exponent[k], Vector::constant(kMinusTwoLnTwo), log));
    }
}

// Cosine and sine of the angles that the second of n pairs of words name; a sign and an exchange take their two last bits.
template <int n> inline __attribute__((always_inline)) void circle(const Words* r, Floats* a, Floats* b) {
    Floats t[n], s[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
        t[k] = Vector::multiply(Vector::from_signed(r[2 * k + 1]), Vector::constant(0x1p-32f));
        s[k] = Vector::multiply(t[k], t[k]);
    }
    horner<n>(s, kSin, b);
    horner<n>(s, kCos, a);
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
        const Words word = r[2 * k + 1];
        b[k] = Vector::multiply(b[k], t[k]);
        a[k] = Vector::bits(Vector::exclusive_or(Vector::bits(a[k]), Vector::template left<31>(word)));
        Vector::swap(word, a[k], b[k]);
    }
}

// The four vectors of which a, b, c, d are the columns, in the order of `Order<Keep::four>`.
inline __attribute__((always_inline)) void transpose(Floats a, Floats b, Floats c, Floats d, Floats out[4]) {
    const Floats low_ab = Vector::low(a, b), high_ab = Vector::high(a, b);
    const Floats low_cd = Vector::low(c, d), high_cd = Vector::high(c, d);
    out[0] = Vector::low_pairs(low_ab, low_cd);
    out[1] = Vector::high_pairs(low_ab, low_cd);
    out[2] = Vector::low_pairs(high_ab, high_cd);
    out[3] = Vector::high_pairs(high_ab, high_cd);
}

// Two normals of each lane of n pairs of words.
template <int n> inline __attribute__((always_inline)) void box_muller(const Words* r, Floats* first, Floats* second) {
    Floats length[n];
    radius<n>(r, length);
    circle<n>(r, first, second);
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
        first[k] = Vector::multiply(length[k], first[k]);
        second[k] = Vector::multiply(length[k], second[k]);
    }
}

// What is made of groups' words: vectors of numbers in the order in which they are stored, 4 / 2 / 1 of them a group.
struct Normals {
    using Number = float;
    template <Keep keep, int groups> static inline __attribute__((always_inline)) void make(const Words* r, Floats* out) {
        if constexpr (keep == Keep::four) {
            Floats a[2 * groups], b[2 * groups];
            box_muller<2 * groups>(r, a, b);
#pragma GCC unroll 4
            for (int k = 0; k < 2 * groups; k += 2) transpose(a[k], b[k], a[k + 1], b[k + 1], out + 2 * k);
        } else {
            static_assert(groups == 1, "several groups of whole counters only");
            Floats a, b;
            box_muller<1>(r, &a, &b);
            out[0] = keep == Keep::one ? a : Vector::low(a, b);
            if (keep == Keep::two) out[1] = Vector::high(a, b);
        }
    }
};

struct RawWords {
    using Number = uint32_t;
    template <Keep keep, int groups> static inline __attribute__((always_inline)) void make(const Words* r, Floats* out) {
        static_assert(keep != Keep::two, "words of whole counters, or the first of each");
        if constexpr (keep == Keep::one) {
            out[0] = Vector::bits(r[0]);
            return;
        }
#pragma GCC unroll 4
        for (int g = 0; g < groups; ++g, r += 4, out += 4)
            transpose(Vector::bits(r[0]), Vector::bits(r[1]), Vector::bits(r[2]), Vector::bits(r[3]), out);
    }
};

}  // namespace
