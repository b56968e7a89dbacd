// The operations on one instruction set; what each means is said in fastdiff/reference/row.py.
//
// Work is cut into tiles that stay in the first cache. A tile goes through short loops, one for each thing that an
// operation may do to it, so that operands can be present or absent, of any dtype and layout, at no cost in code.
#pragma once
#include <stdlib.h>

#include "fastdiff.h"
#include "noise.h"
#include "tensors.h"

namespace {

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return a * b + c; }  // as the reference: two roundings

struct Geometry {
    int64_t samples, numel;  // of one sample
    int64_t ndim;
    const int64_t* shape;

    // a[0] …: where the axes' lengths stand, samples, elements of one, axes
    explicit Geometry(const int64_t* a) : samples(a[1]), numel(a[2]), ndim(a[3]), shape(a + a[0]) {}
    int64_t per_tile() const { return numel >= kTile ? 1 : numel ? kTile / numel : 1; }
    int64_t tiles_per_sample() const { return numel >= kTile ? (numel + kTile - 1) / kTile : 1; }
    int64_t tiles() const {
        if (numel == 0) return 0;
        return numel >= kTile ? samples * tiles_per_sample() : (samples + per_tile() - 1) / per_tile();
    }
};

struct Tile {
    int64_t sample, samples;  // the first, and how many (whole ones if more than one)
    int64_t element;          // of its first sample
    int64_t first;            // element of the tensor
    int n;

    Tile(const Geometry& g, int64_t index) {
        if (g.numel >= kTile) {
            sample = index / g.tiles_per_sample();
            element = index % g.tiles_per_sample() * kTile;
            samples = 1;
            n = int(g.numel - element < kTile ? g.numel - element : kTile);
        } else {
            sample = index * g.per_tile();
            element = 0;
            samples = g.samples - sample < g.per_tile() ? g.samples - sample : g.per_tile();
            n = int(samples * g.numel);
        }
        first = sample * g.numel + element;
    }
};

struct Cursor {
    int64_t row;
    uint32_t first_sample;
    uint64_t seed;

    explicit Cursor(const int64_t* p) : row(p[0]), first_sample(uint32_t(p[1])), seed(uint64_t(p[2])) {}
    Source source(int64_t stream) const { return Source(seed, uint32_t(row), uint32_t(stream)); }
};

// ---- noise ----------------------------------------------------------------------------------------------------------

template <class Kind, Keep keep>
inline __attribute__((always_inline)) void store_numbers(const Words r[4], typename Kind::Number* out) {
    Floats v[4];
    Kind::template make<keep>(r, v);
    for (int k = 0; k < int(keep); ++k) Vector::store(reinterpret_cast<float*>(out) + k * Vector::lanes, v[k]);
}

// n numbers of one sample, from the counter `quad` on.
template <class Kind> void fill_one(typename Kind::Number* out, int n, uint32_t quad, uint32_t sample, const Source& source) {
    constexpr int L = Vector::lanes;
    OneSample<Keep::four> counters(quad, sample, source);
    Words r[4];
    int i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        counters.next(source, r);
        store_numbers<Kind, Keep::four>(r, out + i);
    }
    if (i < n) {
        typename Kind::Number rest[4 * L];
        counters.next(source, r);
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

// ---- chains ---------------------------------------------------------------------------------------------------------

template <class S> struct Term {
    const S* value;
    S factor;
    const S* factors;  // one an element instead, if not null
};

template <class S, int count, bool first> void add_terms(S* out, const Term<S>* terms, int n) {
    const S *v0 = terms[0].value, *v1 = count > 1 ? terms[1].value : nullptr, *v2 = count > 2 ? terms[2].value : nullptr;
    const S c0 = terms[0].factor, c1 = count > 1 ? terms[1].factor : S(0), c2 = count > 2 ? terms[2].factor : S(0);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
        S total = first ? v0[i] * c0 : fma(v0[i], c0, out[i]);
        if (count > 1) total = fma(v1[i], c1, total);
        if (count > 2) total = fma(v2[i], c2, total);
        out[i] = total;
    }
}

// Σ factor·value in order: one product, then fma by fma.
template <class S> struct Chain {
    Term<S> terms[9];
    int count = 0;

    void add(const S* value, S factor) {
        if (factor != S(0)) terms[count++] = {value, factor, nullptr};
    }
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

// The last term of a chain with the noise that it adds, in one loop: out = Σ factor·value + c·z. Returns whether all of out
// is finite, and stores scale·out at net_input if that is not null.
template <int count>
bool add_noise(
    float* out, const Term<float>* terms, float c, float* net_input, float scale, int n, uint32_t quad, uint32_t sample,
    const Source& source) {
    constexpr int L = Vector::lanes, kAhead = 512;
    const float *v0 = terms[0].value, *v1 = terms[count > 1 ? 1 : 0].value, *v2 = terms[count > 2 ? 2 : 0].value;
    const float f0 = terms[0].factor, f1 = terms[count > 1 ? 1 : 0].factor, f2 = terms[count > 2 ? 2 : 0].factor;
    OneSample<Keep::four> counters(quad, sample, source);
    Words r[4];
    Floats bad = Vector::constant(0.0f), z[4];
    int i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        for (int line = 0; line < 4 * L; line += 16) {
            __builtin_prefetch(v0 + i + kAhead + line);
            if (count > 1) __builtin_prefetch(v1 + i + kAhead + line);
            if (count > 2) __builtin_prefetch(v2 + i + kAhead + line);
        }
        counters.next(source, r);
        Normals::make<Keep::four>(r, z);
        for (int k = 0; k < 4; ++k) {
            const int at = i + k * L;
            Floats total = Vector::multiply(Vector::load(v0 + at), Vector::constant(f0));
            if (count > 1) total = Vector::fma(Vector::load(v1 + at), Vector::constant(f1), total);
            if (count > 2) total = Vector::fma(Vector::load(v2 + at), Vector::constant(f2), total);
            total = Vector::fma(z[k], Vector::constant(c), total);
            Vector::store(out + at, total);
            bad = Vector::fma(total, Vector::constant(0.0f), bad);
            if (net_input) Vector::store(net_input + at, Vector::multiply(total, Vector::constant(scale)));
        }
    }
    float sums[L], all = 0;
    Vector::store(sums, bad);
    for (int k = 0; k < L; ++k) all += sums[k];
    if (i < n) {
        float rest[4 * L];
        counters.next(source, r);
        store_numbers<Normals, Keep::four>(r, rest);
        for (int k = 0; i < n; ++i, ++k) {
            float total = v0[i] * f0;
            if (count > 1) total = fma(v1[i], f1, total);
            if (count > 2) total = fma(v2[i], f2, total);
            out[i] = total = fma(rest[k], c, total);
            all += total * 0.0f;
            if (net_input) net_input[i] = total * scale;
        }
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
template <class S> void flag(int64_t* first_bad, const S* v, const Geometry& g, const Tile& tile, int64_t row) {
    if (finite(v, tile.n)) return;
    const int each = int(tile.n / tile.samples);
    for (int64_t i = 0; i < tile.samples; ++i)
        if (!finite(v + i * each, each)) {
            // tiles of one sample may meet here, and all bring the same row
            int64_t* place = first_bad + tile.sample + i;
            if (__atomic_load_n(place, __ATOMIC_RELAXED) > row) __atomic_store_n(place, row, __ATOMIC_RELAXED);
        }
    (void)g;
}

// One factor a sample, spread over the tile's elements.
template <class S> const S* spread(S* out, const Tile& tile, const S* per_sample, int64_t stride) {
    const int each = int(tile.n / tile.samples);
    for (int64_t i = 0; i < tile.samples; ++i) {
        const S factor = per_sample[(tile.sample + i) * stride];
        for (int k = 0; k < each; ++k) out[i * each + k] = factor;
    }
    return out;
}

template <class S> void add_per_sample(
    Chain<S>& chain, const S* value, const Tile& tile, const S* per_sample, int64_t stride, S* buffer) {
    if (tile.samples == 1)
        chain.add_always(value, per_sample[tile.sample * stride]);
    else
        chain.add_each(value, spread(buffer, tile, per_sample, stride));
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// By halves: element i + element i + n/2, n a power of two beyond which all are zeros.
inline double halve(double* v, int64_t n) {
    int64_t width = 1;
    while (width < n) width *= 2;
    while (width > 1) {
        width /= 2;
        for (int64_t i = 0; i + width < n; ++i) v[i] += v[i + width];
        if (n > width) n = width;
    }
    return n ? v[0] : 0.0;
}

constexpr int kBlock = 1024;

// Sums over each sample, from partial sums of blocks of 1024; `count` sums side by side.
struct Sums {
    double* partial;
    int64_t blocks, samples;
    int count;

    Sums(const Geometry& g, int count) : blocks((g.numel + kBlock - 1) / kBlock), samples(g.samples), count(count) {
        partial = static_cast<double*>(malloc(sizeof(double) * size_t(blocks * samples * count + 1)));
    }
    ~Sums() { free(partial); }
    Sums(const Sums&) = delete;

    // Adds the tile's elements, given by `element(i)`, to sum number `which`.
    template <class Element> void add(const Geometry& g, const Tile& tile, int which, Element element) {
        alignas(64) double v[kBlock];
        const int each = int(tile.n / tile.samples);
        for (int64_t s = 0; s < tile.samples; ++s)
            for (int from = 0; from < each; from += kBlock) {
                const int length = each - from < kBlock ? each - from : kBlock, offset = int(s) * each + from;
                for (int i = 0; i < length; ++i) v[i] = element(offset + i);
                const int64_t block = (tile.element + from) / kBlock;
                partial[((tile.sample + s) * count + which) * blocks + block] = halve(v, length);
            }
        (void)g;
    }
    double total(int64_t sample, int which) { return halve(partial + (sample * count + which) * blocks, blocks); }
};

// ---- loops over tiles -----------------------------------------------------------------------------------------------

template <class Body> struct Range {
    const Geometry* g;
    const Body* body;
    static void run(int64_t begin, int64_t end, void* self) {
        const Range* range = static_cast<Range*>(self);
        for (int64_t index = begin; index < end; ++index) (*range->body)(Tile(*range->g, index));
    }
};

// body(tile) for all tiles, on torch's own threads where there is work for more than one.
template <class Body> void each_tile(const Geometry& g, const Body& body) {
    Range<Body> range{&g, &body};
    const int64_t tiles = g.tiles(), size = g.numel >= kTile ? kTile : g.per_tile() * g.numel;
    constexpr int64_t kWorthAThread = 16384;
    if (tiles == 0) return;
    if (fastdiff_parallel_for && tiles * size >= 2 * kWorthAThread)
        fastdiff_parallel_for(0, tiles, (kWorthAThread + size - 1) / size, Range<Body>::run, &range);
    else
        Range<Body>::run(0, tiles, &range);
}

// ---- operations -----------------------------------------------------------------------------------------------------

constexpr int kHeader = 4;  // the geometry's numbers
// The tensors of a call: after its geometry and `scalars` numbers, four for each that is present.
struct Arguments {
    const int64_t* entry[kMaxTensors] = {};
    Geometry g;

    Arguments(const int64_t* a, int scalars) : g(a) {
        for (const int64_t* e = a + kHeader + scalars; e < a + a[0]; e += 4) entry[e[0]] = e;
    }
    View operator()(int i) const { return entry[i] ? View::of(entry[i] + 1, g.ndim, g.shape) : View(); }
    // Whether tensors from … to that are present have a floating dtype.
    bool floating(int from, int to) const {
        for (int i = from; i <= to; ++i)
            if (entry[i] && entry[i][2] > kFloat16) return false;
        return true;
    }
};

// out, cursor; stream
template <bool is_sign> int fill(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View out = view(0);
    const Cursor cursor(view(1).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    const bool wide = out.dtype == kFloat64;
    each_tile(g, [&](const Tile& tile) {
        alignas(64) float buffer[kTile];
        float* z = wide ? buffer : out.as<float>() + tile.first;
        is_sign ? signs(z, g, tile, cursor, source) : normals(z, g, tile, cursor, source);
        if (wide) out.write(tile.first, tile.n, z);
    });
    return 0;
}

// Tile of standard normals in the state's dtype: given, or drawn.
template <class S> const S* noise(
    S* buffer, const View& given, const Geometry& g, const Tile& tile, const Cursor& cursor, const Source& source) {
    if (given) return given.read(tile.first, tile.n, buffer);
    if constexpr (sizeof(S) == 4) {
        normals(buffer, g, tile, cursor, source);
    } else {
        alignas(64) float narrow[kTile];
        normals(narrow, g, tile, cursor, source);
        for (int i = 0; i < tile.n; ++i) buffer[i] = narrow[i];
    }
    return buffer;
}

// A row's numbers, in the order of fastdiff.table.COLUMNS.
template <class S> struct Row {
    S a, e, b[4], c, p, q, low, high, next_scale, guidance, log_slope, log_mid, known_alpha, known_sigma, gain, cap;
};

template <class S> S clamped(S v, S low, S high) {
    v = v < low ? low : v;  // NaN stays
    return v > high ? high : v;
}

// h_0 before its clamp: p·x + q·(guide + guidance·(m − guide)), in `buffer` unless it is m itself.
template <class S> const S* prediction(
    const Row<S>& row, const View& x, const View& m, const View& guide, const Tile& tile, S* buffer, S* scratch, S* other) {
    const S* value = m.read(tile.first, tile.n, buffer);
    if (guide) {
        const S* unguided = guide.read(tile.first, tile.n, scratch);
        const S weight = row.guidance;
        for (int i = 0; i < tile.n; ++i) buffer[i] = fma(value[i] - unguided[i], weight, unguided[i]);
        value = buffer;
    }
    if (row.p == S(0) && row.q == S(1)) return value;
    Chain<S> chain;
    if (row.p != S(0)) chain.add(x.read(tile.first, tile.n, scratch), row.p);
    chain.add(value, row.q);
    chain.run(other, tile.n);
    return other;
}

template <class S> void clamp(S* out, const S* v, S low, S high, int n) {
    for (int i = 0; i < n; ++i) out[i] = clamped(v[i], low, high);
}

template <class S> void write_scaled(const View& to, const Tile& tile, const S* v, S scale, S* buffer) {
    if (scale != S(1)) {
        for (int i = 0; i < tile.n; ++i) buffer[i] = v[i] * scale;
        v = buffer;
    }
    to.write(tile.first, tile.n, v);
}

inline double exponential(double u) { return exp(u); }

// e^u by exactly rounded steps, as fastdiff.reference.row has it.
inline float exponential(float u) {
    u = clamped(u, -86.0f, 88.0f);
    const float whole = rintf(u * 0x1.715476p+0f), n = u == u ? whole : 0.0f;
    const float r = fma(n, -0x1.2fefa4p-17f, fma(n, -0x1.62e3p-1f, u));
    float p = fma(0x1.a01a02p-13f, r, 0x1.6c16c2p-10f);
    p = fma(p, r, 0x1.111112p-7f);
    p = fma(p, r, 0x1.555556p-5f);
    p = fma(p, r, 0x1.555556p-3f);
    p = fma(p, r, 0x1p-1f);
    p = fma(p, r, 1.0f);
    p = fma(p, r, 1.0f);
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

template <class S> void learned_scales(S* out, const S* v, S slope, S mid, int n) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) out[i] = exponential(fma(v[i], slope, mid));
}

template <class S> const Row<S>* row_of(const View& table, const Cursor& cursor, int64_t rows) {
    return cursor.row < 0 || cursor.row >= rows ? nullptr : table.as<const Row<S>>() + cursor.row;
}

// out, table, cursor, x, m, net_input, first_bad, measured, pushed, guide, v, base, z, known, mask, h1 … h4; rows, stream
template <class S> int step(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 2);
    const View out = view(0), x = view(3), m = view(4), net_input = view(5), measured = view(7), pushed = view(8),
               guide = view(9), v = view(10), base = view(11), given = view(12), known = view(13), mask = view(14);
    const View history[4] = {view(15), view(16), view(17), view(18)};
    if (!view.floating(3, 5) || !view.floating(9, 13) || !view.floating(15, 18) || (mask && mask.dtype != kBool)) return kWrongDtype;
    int64_t* first_bad = view(6).as<int64_t>();
    const Cursor cursor(view(2).as<const int64_t>());
    const Row<S>* found = row_of<S>(view(1), cursor, a[kHeader]);
    if (!found) return kRowOutOfRange;
    const Row<S> row = *found;
    const int64_t stream = a[kHeader + 1];
    const Source source = cursor.source(stream < 0 ? 0 : stream);
    const bool noisy = (given || stream >= 0) && (row.c != S(0) || v || measured || (mask && row.known_sigma != S(0)));
    const bool clips = m && (row.low > S(-INFINITY) || row.high < S(INFINITY));
    each_tile(g, [&](const Tile& tile) {
        const int n = tile.n;
        alignas(64) S buffers[14][kTile];
        const S* h0 = nullptr;
        if (m) {
            h0 = prediction(row, x, m, guide, tile, buffers[0], buffers[1], buffers[2]);
            if (clips) {
                if (first_bad) flag(first_bad, h0, g, tile, cursor.row);
                clamp(buffers[2], h0, row.low, row.high, n);
                h0 = buffers[2];
            }
            if (pushed) memcpy(pushed.as<S>() + tile.first, h0, size_t(n) * sizeof(S));
        }
        Chain<S> chain;
        if (row.a != S(0)) chain.add(x.read(tile.first, n, buffers[4]), row.a);
        if (base && row.e != S(0)) chain.add(base.read(tile.first, n, buffers[5]), row.e);
        const S* per_sample = measured.as<const S>();
        if (h0 && measured)
            add_per_sample(chain, h0, tile, per_sample, 2, buffers[6]);
        else if (h0)
            chain.add(h0, row.b[0]);
        for (int j = 0, k = h0 ? 1 : 0; j < 4 && k < 4; ++j, ++k)
            if (history[j] && row.b[k] != S(0)) chain.add(history[j].read(tile.first, n, buffers[7 + j]), row.b[k]);
        S* result = out.as<S>() + tile.first;
        if constexpr (sizeof(S) == 4) {
            if (noisy && !given && !v && !mask && tile.samples == 1 && g.numel >= 16 * Vector::lanes && chain.count) {
                if (chain.count > 3) {
                    chain.run(result, n);
                    chain.count = 0;
                    chain.add_always(result, S(1));
                }
                const bool direct = net_input && net_input.dims == 0 && net_input.dtype == kFloat32;
                const auto add = chain.count == 1 ? add_noise<1> : chain.count == 2 ? add_noise<2> : add_noise<3>;
                const bool good = add(
                    result, chain.terms, measured ? per_sample[2 * tile.sample + 1] : row.c,
                    direct ? net_input.as<float>() + tile.first : nullptr, row.next_scale, n, uint32_t(tile.element / 4),
                    cursor.first_sample + uint32_t(tile.sample), source);
                if (first_bad && !good) flag(first_bad, result, g, tile, cursor.row);
                if (net_input && !direct) write_scaled(net_input, tile, result, row.next_scale, buffers[0]);
                return;
            }
        }
        const S* z = noisy ? noise(buffers[3], given, g, tile, cursor, source) : nullptr;
        if (z && v) {
            learned_scales(buffers[11], v.read(tile.first, n, buffers[11]), row.log_slope, row.log_mid, n);
            chain.add_each(z, buffers[11]);
        } else if (z && measured) {
            add_per_sample(chain, z, tile, per_sample + 1, 2, buffers[11]);
        } else if (z) {
            chain.add(z, row.c);
        }
        chain.run(result, n);
        if (mask) {
            Chain<S> kept;
            if (known && row.known_alpha != S(0)) kept.add(known.read(tile.first, n, buffers[12]), row.known_alpha);
            if (z) kept.add(z, row.known_sigma);
            kept.run(buffers[13], n);
            const S* inside = mask.read(tile.first, n, buffers[12]);
            for (int i = 0; i < n; ++i) result[i] = inside[i] != S(0) ? buffers[13][i] : result[i];
        }
        if (first_bad) flag(first_bad, result, g, tile, cursor.row);
        if (net_input) write_scaled(net_input, tile, result, row.next_scale, buffers[0]);
    });
    return 0;
}

// measured, table, cursor, x, m, guide, z, kept; rows, stream, batch
template <class S> int measure_langevin(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 3);
    const View x = view(3), m = view(4), guide = view(5), given = view(6), kept = view(7);
    if (!view.floating(3, 6)) return kWrongDtype;
    S* measured = view(0).as<S>();
    const Cursor cursor(view(2).as<const int64_t>());
    const Row<S>* found = row_of<S>(view(1), cursor, a[kHeader]);
    if (!found) return kRowOutOfRange;
    const Row<S> row = *found;
    const Source source = cursor.source(a[kHeader + 1] < 0 ? 0 : a[kHeader + 1]);
    Sums sums(g, 2);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[4][kTile];
        const S* h = prediction(row, x, m, guide, tile, buffers[0], buffers[1], buffers[2]);
        clamp(buffers[2], h, row.low, row.high, tile.n);
        S* place = kept ? kept.as<S>() + tile.first : buffers[3];
        const S* z = noise(place, given, g, tile, cursor, source);
        if (kept && z != place) memcpy(place, z, size_t(tile.n) * sizeof(S));
        sums.add(g, tile, 0, [&](int i) { return double(z[i]) * double(z[i]); });
        sums.add(g, tile, 1, [&](int i) { return double(buffers[2][i]) * double(buffers[2][i]); });
    });
    double* norms = static_cast<double*>(malloc(sizeof(double) * size_t(4 * g.samples + 1)));
    double mean[2] = {0, 0};
    for (int which = 0; which < 2; ++which) {
        double *own = norms + which * g.samples, *tree = norms + (2 + which) * g.samples;
        for (int64_t i = 0; i < g.samples; ++i) own[i] = tree[i] = g.numel ? sqrt(sums.total(i, which)) : 0.0;
        // the batch is one sample of B numbers to the same tree: in blocks, then over them
        int64_t blocks = 0;
        for (int64_t from = 0; from < g.samples; from += kBlock)
            tree[blocks++] = halve(tree + from, g.samples - from < kBlock ? g.samples - from : kBlock);
        mean[which] = halve(tree, blocks) / double(g.samples);
    }
    for (int64_t i = 0; i < g.samples; ++i) {
        const bool batch = a[kHeader + 2] != 0;
        const double score = batch ? mean[1] : norms[g.samples + i], ratio = (batch ? mean[0] : norms[i]) / score;
        double delta = double(row.gain) * (ratio * ratio);
        if (delta > double(row.cap)) delta = double(row.cap);
        if (!(score > 0)) delta = 0;
        measured[2 * i] = S(delta);
        measured[2 * i + 1] = S(sqrt(2 * delta));
    }
    free(norms);
    return 0;
}

// out, x0, alpha, sigma, cursor; stream
template <class S> int perturb(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View x0 = view(1), none = View();
    if (!view.floating(1, 1)) return kWrongDtype;
    S* out = view(0).as<S>();
    const S *alpha = view(2).as<const S>(), *sigma = view(3).as<const S>();
    const Cursor cursor(view(4).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[4][kTile];
        const S* z = noise(buffers[0], none, g, tile, cursor, source);
        Chain<S> chain;
        add_per_sample(chain, x0.read(tile.first, tile.n, buffers[1]), tile, alpha, 1, buffers[2]);
        add_per_sample(chain, z, tile, sigma, 1, buffers[3]);
        chain.run(out + tile.first, tile.n);
    });
    return 0;
}

// loss, error, output, x0, r, w, weight, cursor; stream
template <class S> int dsm_loss(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View output = view(2), x0 = view(3), none = View();
    if (!view.floating(2, 3)) return kWrongDtype;
    S *loss = view(0).as<S>(), *error = view(1).as<S>();
    const S *r = view(4).as<const S>(), *w = view(5).as<const S>(), *weight = view(6).as<const S>();
    const Cursor cursor(view(7).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[5][kTile];
        const S* z = noise(buffers[0], none, g, tile, cursor, source);
        Chain<S> chain;
        add_per_sample(chain, x0.read(tile.first, tile.n, buffers[1]), tile, r, 1, buffers[2]);
        add_per_sample(chain, z, tile, w, 1, buffers[3]);
        S *target = buffers[4], *place = error + tile.first;
        chain.run(target, tile.n);
        const S* m = output.read(tile.first, tile.n, buffers[1]);
        for (int i = 0; i < tile.n; ++i) place[i] = m[i] - target[i];
        sums.add(g, tile, 0, [&](int i) { return double(place[i]) * double(place[i]); });
    });
    for (int64_t i = 0; i < g.samples; ++i) {
        const double mean = (g.numel ? sums.total(i, 0) : 0.0) / double(g.numel ? g.numel : 1);
        loss[i] = S(double(weight[i]) * mean);
    }
    return 0;
}

// out, error, grad, weight
template <class S> int dsm_loss_backward(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 0);
    const View out = view(0), error = view(1);
    const S *grad = view(2).as<const S>(), *weight = view(3).as<const S>();
    if (!view.floating(0, 1)) return kWrongDtype;
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[2][kTile];
        const S* e = error.read(tile.first, tile.n, buffers[0]);
        const bool direct = out.dtype == (sizeof(S) == 4 ? kFloat32 : kFloat64);
        S* place = direct ? out.as<S>() + tile.first : buffers[1];
        const int each = int(tile.n / tile.samples);
        for (int64_t s = 0; s < tile.samples; ++s) {
            const S factor = S(2.0 * double(weight[tile.sample + s]) * double(grad[tile.sample + s]) / double(g.numel));
            for (int i = int(s) * each; i < int(s + 1) * each; ++i) place[i] = e[i] * factor;
        }
        if (!direct) out.write(tile.first, tile.n, place);
    });
    return 0;
}

// total, value, cursor, probe; stream, whether the probe is of signs
template <class S> int probe_dot(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 2);
    const View value = view(1), probe = view(3);
    if (!view.floating(1, 1) || !view.floating(3, 3)) return kWrongDtype;
    double* total = view(0).as<double>();
    const Cursor cursor(view(2).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[2][kTile];
        alignas(64) float drawn[kTile];
        const S* u = value.read(tile.first, tile.n, buffers[0]);
        if (probe) {
            const S* v = probe.read(tile.first, tile.n, buffers[1]);
            sums.add(g, tile, 0, [&](int i) { return double(u[i]) * double(v[i]); });
            return;
        }
        a[kHeader + 1] ? signs(drawn, g, tile, cursor, source) : normals(drawn, g, tile, cursor, source);
        sums.add(g, tile, 0, [&](int i) { return double(u[i]) * double(drawn[i]); });
    });
    for (int64_t i = 0; i < g.samples; ++i) total[i] = g.numel ? sums.total(i, 0) : 0.0;
    return 0;
}

// after, norm, x, h, k_0 … k_{s-1}; s, and as float64: b_0 … b_{s-1}, e_0 … e_{s-1}, rtol, atol
template <class S> int rk_error(const int64_t* a) {
    const Geometry g(a);
    const int stages = int(a[kHeader]);
    const Arguments view(a, 3 + 2 * stages);
    if (!view.floating(2, 2) || !view.floating(4, 3 + stages)) return kWrongDtype;
    const View x = view(2);
    S *after = view(0).as<S>(), *norm = view(1).as<S>();
    const S* h = view(3).as<const S>();
    const double* weights = reinterpret_cast<const double*>(a + kHeader + 1);
    const S rtol = S(weights[2 * stages]), atol = S(weights[2 * stages + 1]);
    View k[kMaxStages];
    for (int j = 0; j < stages; ++j) k[j] = view(4 + j);
    Sums sums(g, 1);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[4][kTile];
        S factors[kTile];
        const S* before = x.read(tile.first, tile.n, buffers[0]);
        S *next = after + tile.first, *error = buffers[1];
        const auto combine = [&](S* total, const double* w, bool started) {
            for (int j = 0; j < stages; ++j) {
                if (w[j] == 0) continue;
                const S* value = k[j].read(tile.first, tile.n, buffers[2]);
                for (int64_t i = 0; i < tile.samples; ++i) factors[i] = h[tile.sample + i] * S(w[j]);
                const int each = int(tile.n / tile.samples);
                for (int64_t i = 0; i < tile.samples; ++i) {
                    const S factor = factors[i];
                    for (int n = int(i) * each; n < int(i + 1) * each; ++n)
                        total[n] = started ? fma(value[n], factor, total[n]) : value[n] * factor;
                }
                started = true;
            }
            if (!started) memset(total, 0, size_t(tile.n) * sizeof(S));
        };
        if (next != before) memcpy(next, before, size_t(tile.n) * sizeof(S));
        combine(next, weights, true);
        combine(error, weights + stages, false);
        S* ratio = buffers[3];
        for (int i = 0; i < tile.n; ++i) {
            const S u = before[i] < 0 ? -before[i] : before[i], v = next[i] < 0 ? -next[i] : next[i];
            const S size = u != u || u > v ? u : v;  // NaN stays
            ratio[i] = error[i] / fma(size, rtol, atol);
        }
        sums.add(g, tile, 0, [&](int i) { return double(ratio[i]) * double(ratio[i]); });
    });
    for (int64_t i = 0; i < g.samples; ++i) norm[i] = S(sqrt((g.numel ? sums.total(i, 0) : 0.0) / double(g.numel ? g.numel : 1)));
    return 0;
}

// Sine and cosine of an angle; float32 by its quarter turns, counted in float64, and FDN1's polynomials.
inline void sine_cosine(double angle, double& sine, double& cosine) { sine = sin(angle), cosine = cos(angle); }

inline void sine_cosine(float angle, float& sine, float& cosine) {
    const double quarters = double(angle) * 0x1.45f306dc9c883p-1, turns = rint(quarters);
    const float t = float(quarters - turns), s = t * t;
    float p = -0x1.2d9302p-8f, q = 0x1.d99f54p-11f;
    p = fma(p, s, 0x1.465e92p-4f), q = fma(q, s, -0x1.55c4eap-6f);
    p = fma(p, s, -0x1.4abbbap-1f), q = fma(q, s, 0x1.03c1dap-2f);
    p = fma(p, s, 0x1.921fb6p+0f) * t, q = fma(q, s, -0x1.3bd3ccp+0f);
    q = fma(q, s, 1.0f);
    const double quadrant = turns - 4 * floor(turns / 4);
    const bool swap = quadrant == 1 || quadrant == 3;
    sine = swap ? q : p, cosine = swap ? p : q;
    if (quadrant >= 2) sine = -sine;
    if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

// out [B, channels], t [B], frequencies; channels, half, order (0 sin_cos, 1 cos_sin, 2 interleaved), scale (float64)
template <class S> int timestep_embedding(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 4);
    S* out = view(0).as<S>();
    const S *t = view(1).as<const S>(), *frequencies = view(2).as<const S>();
    const S scale = S(*reinterpret_cast<const double*>(a + kHeader + 3));
    const int64_t channels = a[kHeader], half = a[kHeader + 1], order = a[kHeader + 2];
    const int64_t step = order == 2 ? 2 : 1, sine_at = order == 1 ? half : 0, cosine_at = order == 2 ? 1 : half - sine_at;
    for (int64_t i = 0; i < g.samples; ++i) {
        S* line = out + i * channels;
        const S time = t[i] * scale;
        for (int64_t k = 0; k < half; ++k)
            sine_cosine(time * frequencies[k], line[sine_at + k * step], line[cosine_at + k * step]);
        if (channels % 2) line[channels - 1] = 0;
    }
    return 0;
}

inline int run(int op, const int64_t* a, bool wide) {
    switch (op) {
        case kNormal: return fill<false>(a);
        case kRademacher: return fill<true>(a);
        case kStep: return wide ? step<double>(a) : step<float>(a);
        case kMeasureLangevin: return wide ? measure_langevin<double>(a) : measure_langevin<float>(a);
        case kPerturb: return wide ? perturb<double>(a) : perturb<float>(a);
        case kDsmLoss: return wide ? dsm_loss<double>(a) : dsm_loss<float>(a);
        case kDsmLossBackward: return wide ? dsm_loss_backward<double>(a) : dsm_loss_backward<float>(a);
        case kTimestepEmbedding: return wide ? timestep_embedding<double>(a) : timestep_embedding<float>(a);
        case kProbeDot: return wide ? probe_dot<double>(a) : probe_dot<float>(a);
        case kRkError: return wide ? rk_error<double>(a) : rk_error<float>(a);
    }
    return kDone;
}

}  // namespace
