// The operations on one instruction set; what each means is said in fastdiff/reference/row.py.
//
// A tile goes through short loops, one for each thing that an operation may do to it, so that operands can be present or
// absent, of any dtype and layout, at no cost in code.
#pragma once
#include "step.h"

namespace {

// out, cursor; stream
template <bool is_sign> int fill(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View out = view(0);
    if (!view.plain(1, kInt64)) return kWrongCursor;
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

// out, x0, alpha, sigma, cursor; stream
template <class S> int perturb(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View x0 = view(1);
    if (!view.floating(1, 1)) return kWrongDtype;
    S* out = view(0).as<S>();
    const S *alpha = view(2).as<const S>(), *sigma = view(3).as<const S>();
    if (!view.plain(4, kInt64)) return kWrongCursor;
    const Cursor cursor(view(4).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    each_tile(g, [&](const Tile& tile) {
        perturbed(out + tile.first, x0, alpha, sigma, g, tile, cursor, source);
    });
    return 0;
}

// loss, error, output, x0, r, w, weight, cursor; stream
template <class S> int dsm_loss(const int64_t* a) {
    const Geometry g(a);
    const Arguments view(a, 1);
    const View output = view(2), x0 = view(3);
    if (!view.floating(2, 3)) return kWrongDtype;
    S *loss = view(0).as<S>(), *error = view(1).as<S>();
    const S *r = view(4).as<const S>(), *w = view(5).as<const S>(), *weight = view(6).as<const S>();
    if (!view.plain(7, kInt64)) return kWrongCursor;
    const Cursor cursor(view(7).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffer[kTile];
        S* place = error + tile.first;
        perturbed(place, x0, r, w, g, tile, cursor, source);
        const S* m = output.read(tile.first, tile.n, buffer);
FASTDIFF_INDEPENDENT
        for (int i = 0; i < tile.n; ++i) place[i] = m[i] - place[i];
        sums.add(tile, 0, [&](int i) { return double(place[i]) * double(place[i]); });
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
    if (!view.plain(2, kInt64)) return kWrongCursor;
    const Cursor cursor(view(2).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    each_tile(g, [&](const Tile& tile) {
        alignas(64) S buffers[2][kTile];
        alignas(64) float drawn[kTile];
        const S* u = value.read(tile.first, tile.n, buffers[0]);
        if (probe) {
            const S* v = probe.read(tile.first, tile.n, buffers[1]);
            sums.add(tile, 0, [&](int i) { return double(u[i]) * double(v[i]); });
            return;
        }
        a[kHeader + 1] ? signs(drawn, g, tile, cursor, source) : normals(drawn, g, tile, cursor, source);
        sums.add(tile, 0, [&](int i) { return double(u[i]) * double(drawn[i]); });
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
        sums.add(tile, 0, [&](int i) { return double(ratio[i]) * double(ratio[i]); });
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
