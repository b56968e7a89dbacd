// A row of a table, and the measurement that may scale it.
#pragma once
#include "chains.h"
#include "sums.h"

namespace {

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

// first_i·x0 + second_i·ε of a tile, in `out`.
template <class S> void perturbed(
    S* out, const View& x0, const S* first, const S* second, const Geometry& g, const Tile& tile, const Cursor& cursor,
    const Source& source) {
    alignas(64) S buffers[4][kTile];
    const S* clean = x0.read(tile.first, tile.n, buffers[1]);
    if constexpr (sizeof(S) == 4) {
        if (in_one_loop(g, tile)) {
            const Term<S> term = {clean, first[tile.sample], nullptr};
            add_noise<1>(out, &term, second[tile.sample], nullptr, 1, tile, cursor, source);
            return;
        }
    }
    Chain<S> chain;
    add_per_sample(chain, clean, tile, first, 1, buffers[2]);
    add_per_sample(chain, noise(buffers[0], View(), g, tile, cursor, source), tile, second, 1, buffers[3]);
    chain.run(out, tile.n);
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

// e^(mid + slope·v); without v, where slope is 0, whatever v holds.
template <class S> void learned_scales(S* out, const S* v, S slope, S mid, int n) {
    if (!v) {
        for (int i = 0; i < n; ++i) out[i] = exponential(mid);
        return;
    }
FASTDIFF_INDEPENDENT
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
    if (!view.plain(2, kInt64)) return kWrongCursor;
    if (!view.plain(1, sizeof(S) == 4 ? kFloat32 : kFloat64)) return kWrongTable;
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
                if (first_bad) flag(first_bad, h0, tile, cursor.row);
                clamp(buffers[2], h0, row.low, row.high, n);
                h0 = buffers[2];
            }
            if (pushed) memcpy(pushed.as<S>() + tile.first, h0, size_t(n) * sizeof(S));
        }
        Chain<S> chain;
        if (row.a != S(0)) chain.add(x.read(tile.first, n, buffers[4]), row.a);
        if (base && row.e != S(0)) chain.add(base.read(tile.first, n, buffers[5]), row.e);
        const S* per_sample = measured.as<const S>();
        const bool earlier = !h0 && measured && history[0];  // then it is the first of them that is scaled
        if (h0 && measured)
            add_per_sample(chain, h0, tile, per_sample, 2, buffers[6]);
        else if (earlier)
            add_per_sample(chain, history[0].read(tile.first, n, buffers[7]), tile, per_sample, 2, buffers[6]);
        else if (h0)
            chain.add(h0, row.b[0]);
        for (int j = earlier ? 1 : 0, k = h0 || earlier ? 1 : 0; j < 4 && k < 4; ++j, ++k)
            if (history[j] && row.b[k] != S(0)) chain.add(history[j].read(tile.first, n, buffers[7 + j]), row.b[k]);
        S* result = out.as<S>() + tile.first;
        if constexpr (sizeof(S) == 4) {
            if (noisy && !given && !v && !mask && in_one_loop(g, tile) && chain.count) {
                if (chain.count > 3) {
                    chain.run(result, n);
                    chain.count = 0;
                    chain.add_always(result, S(1));
                }
                const bool direct = net_input && net_input.dims == 0 && net_input.dtype == kFloat32;
                const auto add = chain.count == 1 ? add_noise<1> : chain.count == 2 ? add_noise<2> : add_noise<3>;
                const bool good = add(
                    result, chain.terms, measured ? per_sample[2 * tile.sample + 1] : row.c,
                    direct ? net_input.as<float>() + tile.first : nullptr, row.next_scale, tile, cursor, source);
                if (first_bad && !good) flag(first_bad, result, tile, cursor.row);
                if (net_input && !direct) write_scaled(net_input, tile, result, row.next_scale, buffers[0]);
                return;
            }
        }
        const S* z = noisy ? noise(buffers[3], given, g, tile, cursor, source) : nullptr;
        if (z && measured) {
            add_per_sample(chain, z, tile, per_sample + 1, 2, buffers[11]);
        } else if (z && v) {
            const S* learned = row.log_slope == S(0) ? nullptr : v.read(tile.first, n, buffers[11]);
            learned_scales(buffers[11], learned, row.log_slope, row.log_mid, n);
            chain.add_each(z, buffers[11]);
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
        if (first_bad) flag(first_bad, result, tile, cursor.row);
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
    if (!view.plain(2, kInt64)) return kWrongCursor;
    if (!view.plain(1, sizeof(S) == 4 ? kFloat32 : kFloat64)) return kWrongTable;
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
        sums.add(tile, 0, [&](int i) { return double(z[i]) * double(z[i]); });
        sums.add(tile, 1, [&](int i) { return double(buffers[2][i]) * double(buffers[2][i]); });
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

}  // namespace
