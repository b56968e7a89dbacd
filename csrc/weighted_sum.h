// Σ factor·value over a tile, in the reference's order and roundings; whether a tile is finite.
#pragma once
#include <type_traits>

#include "fill.h"

// Tells the compiler that no turn of the next loop reads what another one writes: an operand may be the output itself, but
// then each element is read and written in the same turn.
#if defined(__clang__)
#define FASTDIFF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTDIFF_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return a * b + c; }  // as the reference: two roundings

template <class S> struct Term {
    const S* value;
    S factor;
    const S* factors;  // if not null: a factor for each element, instead of `factor`
};

template <class S, int count, bool first> void add_terms(S* out, const Term<S>* terms, int n) {
    const S *v0 = terms[0].value, *v1 = count > 1 ? terms[1].value : nullptr, *v2 = count > 2 ? terms[2].value : nullptr;
    const S c0 = terms[0].factor, c1 = count > 1 ? terms[1].factor : S(0), c2 = count > 2 ? terms[2].factor : S(0);
FASTDIFF_INDEPENDENT
    for (int i = 0; i < n; ++i) {
        S total = first ? v0[i] * c0 : fma(v0[i], c0, out[i]);
        if (count > 1) total = fma(v1[i], c1, total);
        if (count > 2) total = fma(v2[i], c2, total);
        out[i] = total;
    }
}

// Σ factor·value in the order of the terms: one product, then fma by fma.
template <class S> struct WeightedSum {
    Term<S> terms[9];
    int count = 0;

    void add(const S* value, S factor) {
        if (factor != S(0)) terms[count++] = {value, factor, nullptr};
    }
    // also where the factor is 0: a sample's own, not the row's
    void add_always(const S* value, S factor) { terms[count++] = {value, factor, nullptr}; }
    void add_each(const S* value, const S* factors) { terms[count++] = {value, S(0), factors}; }

    void run(S* out, int n) const {
        if (count == 0) memset(out, 0, size_t(n) * sizeof(S));
        for (int at = 0; at < count;) {
            const Term<S>* t = terms + at;
            if (t->factors) {
                const S *value = t->value, *factors = t->factors;
                if (at == 0)
                    for (int i = 0; i < n; ++i) out[i] = value[i] * factors[i];
                else
                    for (int i = 0; i < n; ++i) out[i] = fma(value[i], factors[i], out[i]);
                ++at;
                continue;
            }
            int run = 1;
            while (run < 3 && at + run < count && !t[run].factors) ++run;
            if (at == 0) {
                if (run == 1) add_terms<S, 1, true>(out, t, n);
                if (run == 2) add_terms<S, 2, true>(out, t, n);
                if (run == 3) add_terms<S, 3, true>(out, t, n);
            } else {
                if (run == 1) add_terms<S, 1, false>(out, t, n);
                if (run == 2) add_terms<S, 2, false>(out, t, n);
                if (run == 3) add_terms<S, 3, false>(out, t, n);
            }
            at += run;
        }
    }
};

// Whether a tile is of one sample, and that one large enough for the loop below.
inline bool fits_one_loop(const Geometry& g, const Tile& tile) { return tile.samples == 1 && g.numel >= 16 * Vector::lanes; }

// out = Σ factor·value + c·z over a tile, in one loop, which never stores z; there is none if not `noisy`. Returns whether all
// of out is finite, and stores scale·out at net_input if that is not null.
template <int count, bool noisy> bool sum_in_one_loop(
    float* out, const Term<float>* terms, float c, float* net_input, float scale, const Tile& tile, const Cursor& cursor,
    const Source& source) {
    constexpr int L = Vector::lanes, kAhead = 256, kLine = 16;
    const int n = tile.n;
    const float* values[count];
    float factors[count];
    for (int j = 0; j < count; ++j) values[j] = terms[j].value, factors[j] = terms[j].factor;
    OneSample<Keep::four> counters(uint32_t(tile.element / 4), cursor.first_sample + uint32_t(tile.sample), source);
    Floats bad = Vector::constant(0.0f);
    // L numbers from i on
    const auto put = [&](int i, Floats z) __attribute__((always_inline)) {
        Floats total = Vector::multiply(Vector::load(values[0] + i), Vector::constant(factors[0]));
        for (int j = 1; j < count; ++j)
            total = Vector::fma_of_any(Vector::load(values[j] + i), Vector::constant(factors[j]), total);
        if (noisy) total = Vector::fma_of_any(z, Vector::constant(c), total);
        Vector::store(out + i, total);
        bad = Vector::fma(total, Vector::constant(0.0f), bad);
        if (net_input) Vector::store(net_input + i, Vector::multiply(total, Vector::constant(scale)));
    };
    // 4·L numbers from i on for each group; what is read and written a little later is asked for meanwhile
    const auto block = [&](int i, auto number) __attribute__((always_inline)) {
        constexpr int groups = decltype(number)::value;
        Floats z[4 * groups] = {};
        for (int at = i + kAhead; at < i + kAhead + 4 * L * groups; at += kLine) {
            for (int j = 0; j < count; ++j) __builtin_prefetch(values[j] + at);
            __builtin_prefetch(out + at, 1);
            if (net_input) __builtin_prefetch(net_input + at, 1);
        }
        if constexpr (noisy) {
            Words r[4 * groups];
            counters.next<groups>(source, r);
            Normals::make<Keep::four, groups>(r, z);
        }
        for (int k = 0; k < 4 * groups; ++k) put(i + k * L, z[k]);
    };
    int i = 0;
    for (; i + 4 * L * kGroups <= n; i += 4 * L * kGroups) block(i, std::integral_constant<int, kGroups>());
    for (; i + 4 * L <= n; i += 4 * L) block(i, std::integral_constant<int, 1>());
    float rest[4 * L];
    if (noisy && i < n) {
        Words r[4];
        counters.next<1>(source, r);
        store_numbers<Normals, Keep::four>(r, rest);
    }
    const float* z = rest;
    for (; i + L <= n; i += L, z += L) put(i, noisy ? Vector::load(z) : Floats());
    float sums[L], all = 0;
    Vector::store(sums, bad);
    for (int k = 0; k < L; ++k) all += sums[k];
    for (; i < n; ++i, ++z) {
        float total = values[0][i] * factors[0];
        for (int j = 1; j < count; ++j) total = fma(values[j][i], factors[j], total);
        if (noisy) total = fma(*z, c, total);
        out[i] = total;
        all += total * 0.0f;
        if (net_input) net_input[i] = total * scale;
    }
    return all == 0.0f;
}

// 0·v is NaN where v is not finite, and the sum keeps it.
template <class S> bool finite(const S* v, int n) {
    S sum[16] = {};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; ++k) sum[k] += v[i + k] * S(0);
    for (; i < n; ++i) sum[0] += v[i] * S(0);
    S total = 0;
    for (int k = 0; k < 16; ++k) total += sum[k];
    return total == S(0);
}

// first_bad ← min(itself, row) for the tile's samples that are not finite.
template <class S> void flag(int64_t* first_bad, const S* v, const Tile& tile, int64_t row) {
    if (finite(v, tile.n)) return;
    const int each = int(tile.n / tile.samples);
    for (int64_t i = 0; i < tile.samples; ++i)
        if (!finite(v + i * each, each)) {
            // tiles of one sample may meet here, and all bring the same row
            int64_t* place = first_bad + tile.sample + i;
            if (__atomic_load_n(place, __ATOMIC_RELAXED) > row) __atomic_store_n(place, row, __ATOMIC_RELAXED);
        }
}

// One factor for each sample, repeated for each of its elements in the tile.
template <class S> const S* spread(S* out, const Tile& tile, const S* per_sample, int64_t stride) {
    const int each = int(tile.n / tile.samples);
    for (int64_t i = 0; i < tile.samples; ++i) {
        const S factor = per_sample[(tile.sample + i) * stride];
        for (int k = 0; k < each; ++k) out[i * each + k] = factor;
    }
    return out;
}

template <class S> void add_per_sample(
    WeightedSum<S>& sum, const S* value, const Tile& tile, const S* per_sample, int64_t stride, S* buffer) {
    if (tile.samples == 1)
        sum.add_always(value, per_sample[tile.sample * stride]);
    else
        sum.add_each(value, spread(buffer, tile, per_sample, stride));
}

}  // namespace
