// A tile's random numbers.
#pragma once
#include "noise.h"
#include "tiles.h"

namespace {

template <class Kind, Keep keep, int groups = 1>
inline __attribute__((always_inline)) void store_numbers(const Words* r, typename Kind::Number* out) {
    Floats v[4 * groups];
    Kind::template make<keep, groups>(r, v);
#pragma GCC unroll 8
    for (int k = 0; k < int(keep) * groups; ++k) Vector::store(reinterpret_cast<float*>(out) + k * Vector::lanes, v[k]);
}

// n numbers of one sample, from the counter `quad` on.
template <class Kind> void fill_one(typename Kind::Number* out, int n, uint32_t quad, uint32_t sample, const Source& source) {
    constexpr int L = Vector::lanes;
    OneSample<Keep::four> counters(quad, sample, source);
    Words r[4 * kGroups];
    int i = 0;
    for (; i + 4 * L * kGroups <= n; i += 4 * L * kGroups) {
        counters.next<kGroups>(source, r);
        store_numbers<Kind, Keep::four, kGroups>(r, out + i);
    }
    for (; i + 4 * L <= n; i += 4 * L) {
        counters.next<1>(source, r);
        store_numbers<Kind, Keep::four>(r, out + i);
    }
    if (i < n) {
        typename Kind::Number rest[4 * L];
        counters.next<1>(source, r);
        store_numbers<Kind, Keep::four>(r, rest);
        memcpy(out + i, rest, size_t(n - i) * sizeof rest[0]);
    }
}

// The numbers of whole samples of `numel` elements each, `keep` of each counter's four.
template <class Kind, Keep keep>
void fill_many(typename Kind::Number* out, int64_t samples, int numel, uint32_t sample, const Source& source) {
    constexpr int L = Vector::lanes, kept = int(keep);
    const uint32_t quads = uint32_t(numel + kept - 1) / kept;
    const int64_t counters = samples * quads;
    const bool dense = numel % kept == 0;
    const uint32_t more = uint32_t(L) % quads, whole = uint32_t(L) / quads;
    uint32_t quad_of[L], sample_of[L];
    for (uint32_t lane = 0; lane < uint32_t(L); ++lane) {
        quad_of[lane] = lane % quads;
        sample_of[lane] = sample + lane / quads;
    }
    typename Kind::Number rest[4 * L];
    Words r[4];
    for (int64_t done = 0; done < counters; done += L) {
        const uint32_t from_quad = quad_of[0];
        const int32_t* order = kOrder<keep>.counter;
        philox(Vector::permute(Vector::load(quad_of), order), Vector::permute(Vector::load(sample_of), order), source, r);
        for (int lane = 0; lane < L; ++lane) {
            const uint32_t next = quad_of[lane] + more, carry = next >= quads;
            quad_of[lane] = next - (carry ? quads : 0);
            sample_of[lane] += whole + carry;
        }
        const int64_t left = counters - done;
        if (dense && left >= L) {
            store_numbers<Kind, keep>(r, out);
            out += kept * L;
            continue;
        }
        store_numbers<Kind, keep>(r, rest);
        uint32_t at = from_quad;
        for (int lane = 0; lane < L && lane < left; ++lane) {
            const int wanted = numel - int(at) * kept, length = wanted < kept ? wanted : kept;
            for (int i = 0; i < length; ++i) out[i] = rest[lane * kept + i];
            out += length;
            if (++at == quads) at = 0;
        }
    }
}

// A tile's standard normals.
inline void normals(float* out, const Geometry& g, const Tile& tile, const Cursor& cursor, const Source& source) {
    const uint32_t sample = cursor.first_sample + uint32_t(tile.sample);
    if (g.numel == 1) return fill_many<Normals, Keep::one>(out, tile.samples, 1, sample, source);
    if (g.numel == 2) return fill_many<Normals, Keep::two>(out, tile.samples, 2, sample, source);
    if (g.numel < 16 * Vector::lanes) return fill_many<Normals, Keep::four>(out, tile.samples, int(g.numel), sample, source);
    const int n = int(g.numel < tile.n ? g.numel : tile.n);
    for (int64_t i = 0; i < tile.samples; ++i)
        fill_one<Normals>(out + i * g.numel, n, uint32_t(tile.element / 4), sample + uint32_t(i), source);
}

// A tile's words, as they are.
inline void raw_words(float* out, const Geometry& g, const Tile& tile, const Cursor& cursor, const Source& source) {
    const uint32_t sample = cursor.first_sample + uint32_t(tile.sample);
    alignas(64) uint32_t words[kTile];
    if (g.numel == 1) {
        fill_many<RawWords, Keep::one>(words, tile.samples, 1, sample, source);
    } else if (g.numel < 16 * Vector::lanes) {
        fill_many<RawWords, Keep::four>(words, tile.samples, int(g.numel), sample, source);
    } else {
        const int n = int(g.numel < tile.n ? g.numel : tile.n);
        for (int64_t i = 0; i < tile.samples; ++i)
            fill_one<RawWords>(words + i * g.numel, n, uint32_t(tile.element / 4), sample + uint32_t(i), source);
    }
    memcpy(out, words, size_t(tile.n) * sizeof words[0]);
}

// A tile's signs.
inline void signs(float* out, const Geometry& g, const Tile& tile, const Cursor& cursor, const Source& source) {
    const uint32_t sample = cursor.first_sample + uint32_t(tile.sample);
    alignas(64) uint32_t words[kTile];
    const auto sign = [](uint32_t word, int group) {
        const uint32_t bits = 0x3F800000u | ((word << group) & 0x80000000u);
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    };
    if (g.numel <= 8 * Vector::lanes) {
        fill_many<RawWords, Keep::four>(words, tile.samples, int(g.numel), sample, source);
        for (int i = 0; i < tile.n; ++i) out[i] = sign(words[i], 0);
        return;
    }
    const int n = int(g.numel < tile.n ? g.numel : tile.n);
    for (int64_t i = 0; i < tile.samples; ++i) {
        fill_one<RawWords>(words, n < 512 ? n : 512, uint32_t(tile.element / 2048 * 128), sample + uint32_t(i), source);
        for (int group = 0; group * 512 < n; ++group) {
            const int length = n - group * 512 < 512 ? n - group * 512 : 512;
            for (int e = 0; e < length; ++e) out[i * g.numel + group * 512 + e] = sign(words[e], group);
        }
    }
}

}  // namespace
