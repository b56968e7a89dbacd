// A row of a table, and the measurement that may scale it.
#pragma once
#include "sums.h"
#include "weighted_sum.h"

namespace {

// A tile's standard normals in the state's dtype: those of z, or, if it is absent, drawn.
template <class S> const S* noise(
    S* buffer, const View& z, const Geometry& g, const Tile& tile, const Cursor& cursor, const Source& source) {
    if (z) return z.read(tile.first, tile.n, buffer);
    if constexpr (sizeof(S) == 4) {
        normals(buffer, g, tile, cursor, source);
    } else {
        alignas(64) float narrow[kTile];
        normals(narrow, g, tile, cursor, source);
        for (int i = 0; i < tile.n; ++i) buffer[i] = narrow[i];
    }
    return buffer;
}

template <class S> struct PerturbedBuffers {
    alignas(64) S drawn[kTile], clean[kTile], first[kTile], second[kTile];
};

// first_i·x0 + second_i·ε of a tile, in `out`.
template <class S> void perturbed(
    PerturbedBuffers<S>& buffers, S* out, const View& x0, const S* first, const S* second, const Geometry& g, const Tile& tile, const Cursor& cursor,
    const Source& source) {
    const S* clean = x0.read(tile.first, tile.n, buffers.clean);
    if constexpr (sizeof(S) == 4) {
        if (fits_one_loop(g, tile)) {
            const Term<S> term = {clean, first[tile.sample], nullptr};
            sum_in_one_loop<1, true>(out, &term, second[tile.sample], nullptr, 1, tile, cursor, source);
            return;
        }
    }
    WeightedSum<S> sum;
    add_per_sample(sum, clean, tile, first, 1, buffers.first);
    add_per_sample(sum, noise(buffers.drawn, View(), g, tile, cursor, source), tile, second, 1, buffers.second);
    sum.run(out, tile.n);
}

// A row's numbers, in the order of fastdiff.table.COLUMNS (a test compares them).
template <class S> struct Row {
    S a, e, b[4], c, p, q, low, high, next_scale, guidance, log_slope, log_mid, known_alpha, known_sigma, gain, cap;
};
static_assert(sizeof(Row<float>) == 19 * 4 && sizeof(Row<double>) == 19 * 8, "the table has 19 columns without gaps");

template <class S> S clamped(S v, S low, S high) {
    v = v < low ? low : v;  // NaN stays
    return v > high ? high : v;
}

// What h_0's parts are read to where their own memory will not do.
template <class S> struct PredictionBuffers {
    alignas(64) S m[kTile], other[kTile], h0[kTile];  // other: the guide, then x
};

// h_0 before its clamp: p·x + q·(guide + guidance·(m − guide)); in buffers.h0, or where m is if it is m itself.
template <class S> const S* prediction(
    const Row<S>& row, const View& x, const View& m, const View& guide, const Tile& tile, PredictionBuffers<S>& buffers) {
    const S* value = m.read(tile.first, tile.n, buffers.m);
    if (guide) {
        const S* unguided = guide.read(tile.first, tile.n, buffers.other);
        const S weight = row.guidance;
        for (int i = 0; i < tile.n; ++i) buffers.m[i] = fma(value[i] - unguided[i], weight, unguided[i]);
        value = buffers.m;
    }
    if (row.p == S(0) && row.q == S(1)) return value;
    WeightedSum<S> sum;
    if (row.p != S(0)) sum.add(x.read(tile.first, tile.n, buffers.other), row.p);
    sum.add(value, row.q);
    sum.run(buffers.h0, tile.n);
    return buffers.h0;
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

// e^u by exactly rounded steps, as fastdiff.execution.reference._exp. (Horner's rule without a loop, which would keep the
// compiler from making vectors of the loop around it.)
inline float exponential(float u) {
    u = clamped(u, -86.0f, 88.0f);
    const float whole = rintf(u * kPerLnTwo), n = u == u ? whole : 0.0f;
    const float r = fma(n, -kLnTwoLow, fma(n, -kLnTwoHigh, u));
    float p = fma(kExp[0], r, kExp[1]);
    p = fma(p, r, kExp[2]);
    p = fma(p, r, kExp[3]);
    p = fma(p, r, kExp[4]);
    p = fma(p, r, kExp[5]);
    p = fma(p, r, kExp[6]);
    p = fma(p, r, kExp[7]);
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

inline double exponential(double u) {
    u = clamped(u, -708.0, 709.0);
    const double whole = rint(u * kPerLnTwoWide), n = u == u ? whole : 0.0;
    const double r = fma(n, -kLnTwoLowWide, fma(n, -kLnTwoHighWide, u));
    double p = kExpWide[0];
    for (int i = 1; i < int(sizeof kExpWide / sizeof *kExpWide); ++i) p = fma(p, r, kExpWide[i]);
    const uint64_t bits = uint64_t(int64_t(n) + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// e^(mid + slope·v), v null where the slope is 0.
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

// What the operands and intermediate results of a step are read or computed to where their own memory will not do.
template <class S> struct StepBuffers {
    PredictionBuffers<S> prediction;
    alignas(64) S x[kTile], base[kTile], history[4][kTile], z[kTile], b[kTile], c[kTile];  // b, c: a factor for each element
    alignas(64) S known[kTile], level[kTile];
    S* mask() { return known; }                // read when `known` has been used,
    S* net_input() { return prediction.m; }  // and computed when h_0 has
};

namespace step_slots {
enum {
    kOut, kTable, kCursor, kX, kM, kNetInput, kFirstBad, kMeasured, kPushed, kGuide, kV, kBase, kZ, kKnown, kMask,
    kHistory  // and the three slots after it
};
}
// the table's rows, stream (negative: no noise is drawn)
template <class S> int step(const int64_t* a) {
    using namespace step_slots;
    const Geometry g(a);
    const Arguments view(a, 2);
    const View out = view(kOut), x = view(kX), m = view(kM), net_input = view(kNetInput), measured = view(kMeasured),
               pushed = view(kPushed), guide = view(kGuide), v = view(kV), base = view(kBase), given_z = view(kZ),
               known = view(kKnown), mask = view(kMask);
    const View history[4] = {view(kHistory), view(kHistory + 1), view(kHistory + 2), view(kHistory + 3)};
    const bool floating = view.floating(kX, kNetInput) && view.floating(kGuide, kKnown) && view.floating(kHistory, kHistory + 3);
    if (!floating || (mask && mask.dtype != kBool)) return kWrongDtype;
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    if (!view.plain(kTable, sizeof(S) == 4 ? kFloat32 : kFloat64)) return kWrongTable;
    int64_t* first_bad = view(kFirstBad).as<int64_t>();
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Row<S>* found = row_of<S>(view(kTable), cursor, a[kHeader]);
    if (!found) return kRowOutOfRange;
    const Row<S> row = *found;
    const int64_t stream = a[kHeader + 1];
    const Source source = cursor.source(stream < 0 ? 0 : stream);
    const bool noisy = (given_z || stream >= 0) && (row.c != S(0) || v || measured || (mask && row.known_sigma != S(0)));
    const bool clips = m && (row.low > S(-INFINITY) || row.high < S(INFINITY));
    return each_tile(g, [&](const Tile& tile, void* scratch) {
        const int n = tile.n;
        StepBuffers<S>& buffers = in<StepBuffers<S>>(scratch);
        const S* h0 = nullptr;
        if (m) {
            h0 = prediction(row, x, m, guide, tile, buffers.prediction);
            if (clips) {
                if (first_bad) flag(first_bad, h0, tile, cursor.row);
                clamp(buffers.prediction.h0, h0, row.low, row.high, n);
                h0 = buffers.prediction.h0;
            }
            if (pushed) memcpy(pushed.as<S>() + tile.first, h0, size_t(n) * sizeof(S));
        }
        WeightedSum<S> sum;
        if (row.a != S(0)) sum.add(x.read(tile.first, n, buffers.x), row.a);
        if (base && row.e != S(0)) sum.add(base.read(tile.first, n, buffers.base), row.e);
        const S* per_sample = measured.as<const S>();
        const bool earlier = !h0 && measured && history[0];  // then it is the first of them that is scaled
        if (h0 && measured)
            add_per_sample(sum, h0, tile, per_sample, 2, buffers.b);
        else if (earlier)
            add_per_sample(sum, history[0].read(tile.first, n, buffers.history[0]), tile, per_sample, 2, buffers.b);
        else if (h0)
            sum.add(h0, row.b[0]);
        for (int j = earlier ? 1 : 0, k = h0 || earlier ? 1 : 0; j < 4 && k < 4; ++j, ++k)
            if (history[j] && row.b[k] != S(0)) sum.add(history[j].read(tile.first, n, buffers.history[j]), row.b[k]);
        S* result = out.as<S>() + tile.first;
        const bool one_loop = sizeof(S) == 4 && sum.count && !mask && !(noisy && v) && fits_one_loop(g, tile);
        const bool draws = one_loop && noisy && !given_z;  // in the loop
        const S* z = noisy && !draws ? noise(buffers.z, given_z, g, tile, cursor, source) : nullptr;
        if (z && measured) {
            add_per_sample(sum, z, tile, per_sample + 1, 2, buffers.c);
        } else if (z && v) {
            const S* learned = row.log_slope == S(0) ? nullptr : v.read(tile.first, n, buffers.c);
            learned_scales(buffers.c, learned, row.log_slope, row.log_mid, n);
            sum.add_each(z, buffers.c);
        } else if (z) {
            sum.add(z, row.c);
        }
        if constexpr (sizeof(S) == 4) {
            if (one_loop) {
                if (sum.count > 3) {
                    sum.run(result, n);
                    sum.count = 0;
                    sum.add_always(result, S(1));
                }
                const bool direct = net_input && net_input.dims == 0 && net_input.dtype == kFloat32;
                constexpr decltype(&sum_in_one_loop<1, true>) run[2][3] = {
                    {sum_in_one_loop<1, false>, sum_in_one_loop<2, false>, sum_in_one_loop<3, false>},
                    {sum_in_one_loop<1, true>, sum_in_one_loop<2, true>, sum_in_one_loop<3, true>}};
                const bool good = run[draws][sum.count - 1](
                    result, sum.terms, measured ? per_sample[2 * tile.sample + 1] : row.c,
                    direct ? net_input.as<float>() + tile.first : nullptr, row.next_scale, tile, cursor, source);
                if (first_bad && !good) flag(first_bad, result, tile, cursor.row);
                if (net_input && !direct) write_scaled(net_input, tile, result, row.next_scale, buffers.net_input());
                return;
            }
        }
        sum.run(result, n);
        if (mask) {
            WeightedSum<S> level;
            if (known && row.known_alpha != S(0)) level.add(known.read(tile.first, n, buffers.known), row.known_alpha);
            if (z) level.add(z, row.known_sigma);
            level.run(buffers.level, n);
            const S* inside = mask.read(tile.first, n, buffers.mask());
            for (int i = 0; i < n; ++i) result[i] = inside[i] != S(0) ? buffers.level[i] : result[i];
        }
        if (first_bad) flag(first_bad, result, tile, cursor.row);
        if (net_input) write_scaled(net_input, tile, result, row.next_scale, buffers.net_input());
    });
}

template <class S> struct MeasureBuffers {
    PredictionBuffers<S> prediction;
    alignas(64) S drawn[kTile];
};

namespace measure_langevin_slots { enum { kMeasured, kTable, kCursor, kX, kM, kGuide, kZ, kKept }; }
// the table's rows, stream, whether norms are the batch's means
template <class S> int measure_langevin(const int64_t* a) {
    using namespace measure_langevin_slots;
    const Geometry g(a);
    const Arguments view(a, 3);
    const View x = view(kX), m = view(kM), guide = view(kGuide), given_z = view(kZ), kept = view(kKept);
    if (!view.floating(kX, kZ)) return kWrongDtype;
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    if (!view.plain(kTable, sizeof(S) == 4 ? kFloat32 : kFloat64)) return kWrongTable;
    S* measured = view(kMeasured).as<S>();
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Row<S>* found = row_of<S>(view(kTable), cursor, a[kHeader]);
    if (!found) return kRowOutOfRange;
    const Row<S> row = *found;
    const Source source = cursor.source(a[kHeader + 1] < 0 ? 0 : a[kHeader + 1]);
    Sums sums(g, 2);
    if (!sums) return kNoMemory;
    const int fault = each_tile(g, [&](const Tile& tile, void* scratch) {
        auto& buffers = in<MeasureBuffers<S>>(scratch);
        S* h0 = buffers.prediction.h0;
        clamp(h0, prediction(row, x, m, guide, tile, buffers.prediction), row.low, row.high, tile.n);
        S* place = kept ? kept.as<S>() + tile.first : buffers.drawn;
        const S* z = noise(place, given_z, g, tile, cursor, source);
        if (kept && z != place) memcpy(place, z, size_t(tile.n) * sizeof(S));
        sums.add(tile, 0, [&](int i) { return double(z[i]) * double(z[i]); });
        sums.add(tile, 1, [&](int i) { return double(h0[i]) * double(h0[i]); });
    });
    if (fault) return fault;
    double* norms = static_cast<double*>(malloc(sizeof(double) * (4 * size_t(g.samples) + 1)));
    if (!norms) return kNoMemory;
    double mean[2] = {0, 0};
    for (int which = 0; which < 2; ++which) {
        double *norm = norms + which * g.samples, *tree = norms + (2 + which) * g.samples;
        for (int64_t i = 0; i < g.samples; ++i) norm[i] = tree[i] = g.numel ? sqrt(sums.total(i, which)) : 0.0;
        // the mean over the batch is the same tree, over a sample of B numbers: in blocks, then over them
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
