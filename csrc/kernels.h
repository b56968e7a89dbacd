// The operations on one instruction set; what each means is said in fastdiff/execution/reference.py.
//
// A tile goes through short loops, one for each part of an operation: so an operand may be absent, or of any dtype and layout,
// and no combination of them needs code of its own. An operation's tensors are numbered as in OPERATIONS of
// fastdiff/execution/cpu.py (a test compares them); the comment before it lists the numbers that precede them in a call.
#pragma once
#include "layers.h"
#include "step.h"
#include "update.h"

namespace {

namespace fill_slots { enum { kOut, kCursor }; }
// stream
template <void (*numbers)(float*, const Geometry&, const Tile&, const Cursor&, const Source&)> int fill(const int64_t* a) {
    using namespace fill_slots;
    const Geometry g(a);
    const Arguments view(a, 1);
    const View out = view(kOut);
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    const bool wide = out.dtype == kFloat64;
    return each_tile(g, [&](const Tile& tile, void* scratch) {
        float* z = wide ? in<float[kTile]>(scratch) : out.as<float>() + tile.first;
        numbers(z, g, tile, cursor, source);
        if (wide) out.write(tile.first, tile.n, z);
    });
}

namespace perturb_slots { enum { kOut, kX0, kAlpha, kSigma, kCursor }; }
// stream
template <class S> int perturb(const int64_t* a) {
    using namespace perturb_slots;
    const Geometry g(a);
    const Arguments view(a, 1);
    const View x0 = view(kX0);
    if (!view.floating(kX0, kX0)) return kWrongDtype;
    S* out = view(kOut).as<S>();
    const S *alpha = view(kAlpha).as<const S>(), *sigma = view(kSigma).as<const S>();
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    return each_tile(g, [&](const Tile& tile, void* scratch) {
        perturbed(in<PerturbedBuffers<S>>(scratch), out + tile.first, x0, alpha, sigma, g, tile, cursor, source);
    });
}

template <class S> struct LossBuffers {
    PerturbedBuffers<S> perturbed;
    alignas(64) S output[kTile];
};

namespace dsm_loss_slots { enum { kLoss, kError, kOutput, kX0, kR, kW, kWeight, kCursor }; }
// stream
template <class S> int dsm_loss(const int64_t* a) {
    using namespace dsm_loss_slots;
    const Geometry g(a);
    const Arguments view(a, 1);
    const View output = view(kOutput), x0 = view(kX0);
    if (!view.floating(kOutput, kX0)) return kWrongDtype;
    S *loss = view(kLoss).as<S>(), *error = view(kError).as<S>();
    const S *r = view(kR).as<const S>(), *w = view(kW).as<const S>(), *weight = view(kWeight).as<const S>();
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    if (!sums) return kNoMemory;
    const int fault = each_tile(g, [&](const Tile& tile, void* scratch) {
        auto& buffers = in<LossBuffers<S>>(scratch);
        S* place = error + tile.first;
        perturbed(buffers.perturbed, place, x0, r, w, g, tile, cursor, source);
        const S* m = output.read(tile.first, tile.n, buffers.output);
FASTDIFF_INDEPENDENT
        for (int i = 0; i < tile.n; ++i) place[i] = m[i] - place[i];
        sums.add(tile, 0, [&](int i) { return double(place[i]) * double(place[i]); });
    });
    if (fault) return fault;
    for (int64_t i = 0; i < g.samples; ++i) {
        const double mean = (g.numel ? sums.total(i, 0) : 0.0) / double(g.numel ? g.numel : 1);
        loss[i] = S(double(weight[i]) * mean);
    }
    return 0;
}

namespace dsm_loss_backward_slots { enum { kOut, kError, kGrad, kWeight }; }
template <class S> int dsm_loss_backward(const int64_t* a) {
    using namespace dsm_loss_backward_slots;
    const Geometry g(a);
    const Arguments view(a, 0);
    const View out = view(kOut), error = view(kError);
    const S *grad = view(kGrad).as<const S>(), *weight = view(kWeight).as<const S>();
    if (!view.floating(kOut, kError)) return kWrongDtype;
    return each_tile(g, [&](const Tile& tile, void* scratch) {
        auto& buffers = in<S[2][kTile]>(scratch);
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
}

namespace probe_dot_slots { enum { kTotal, kValue, kCursor, kProbe }; }
// stream, whether the probe is of signs
template <class S> int probe_dot(const int64_t* a) {
    using namespace probe_dot_slots;
    const Geometry g(a);
    const Arguments view(a, 2);
    const View value = view(kValue), probe = view(kProbe);
    if (!view.floating(kValue, kValue) || !view.floating(kProbe, kProbe)) return kWrongDtype;
    double* total = view(kTotal).as<double>();
    if (!view.plain(kCursor, kInt64)) return kWrongCursor;
    const Cursor cursor(view(kCursor).as<const int64_t>());
    const Source source = cursor.source(a[kHeader]);
    Sums sums(g, 1);
    if (!sums) return kNoMemory;
    const int fault = each_tile(g, [&](const Tile& tile, void* scratch) {
        auto& buffers = in<S[2][kTile]>(scratch);
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
    if (fault) return fault;
    for (int64_t i = 0; i < g.samples; ++i) total[i] = g.numel ? sums.total(i, 0) : 0.0;
    return 0;
}

namespace rk_error_slots { enum { kAfter, kNorm, kX, kH, kStages }; }  // the stages take s slots
// the number of stages s, and as float64: b_0 … b_{s-1}, e_0 … e_{s-1}, rtol, atol
template <class S> int rk_error(const int64_t* a) {
    using namespace rk_error_slots;
    const Geometry g(a);
    const int stages = int(a[kHeader]);
    const Arguments view(a, 3 + 2 * stages);
    if (!view.floating(kX, kX) || !view.floating(kStages, kStages + stages - 1)) return kWrongDtype;
    const View x = view(kX);
    S *after = view(kAfter).as<S>(), *norm = view(kNorm).as<S>();
    const S* h = view(kH).as<const S>();
    const double* weights = reinterpret_cast<const double*>(a + kHeader + 1);
    const S rtol = S(weights[2 * stages]), atol = S(weights[2 * stages + 1]);
    View k[kMaxStages];
    for (int j = 0; j < stages; ++j) k[j] = view(kStages + j);
    Sums sums(g, 1);
    if (!sums) return kNoMemory;
    const int fault = each_tile(g, [&](const Tile& tile, void* scratch) {
        auto& buffers = in<S[5][kTile]>(scratch);
        S* factors = buffers[4];
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
    if (fault) return fault;
    for (int64_t i = 0; i < g.samples; ++i) norm[i] = S(sqrt((g.numel ? sums.total(i, 0) : 0.0) / double(g.numel ? g.numel : 1)));
    return 0;
}

// Sine and cosine of an angle. In float32: its quarter turns are counted in float64, what is left goes to FDN1's polynomials.
inline void sine_cosine(double angle, double& sine, double& cosine) { sine = sin(angle), cosine = cos(angle); }

inline void sine_cosine(float angle, float& sine, float& cosine) {
    const double quarters = double(angle) * kQuarters, turns = rint(quarters);
    const float t = float(quarters - turns), s = t * t;
    float p = kSin[0], q = kCos[0];
    p = fma(p, s, kSin[1]), q = fma(q, s, kCos[1]);
    p = fma(p, s, kSin[2]), q = fma(q, s, kCos[2]);
    p = fma(p, s, kSin[3]) * t, q = fma(q, s, kCos[3]);
    q = fma(q, s, kCos[4]);
    const double quadrant = turns - 4 * floor(turns / 4);
    const bool swap = quadrant == 1 || quadrant == 3;
    sine = swap ? q : p, cosine = swap ? p : q;
    if (quadrant >= 2) sine = -sine;
    if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

namespace timestep_embedding_slots { enum { kOut, kT, kFrequencies }; }  // [B, channels], [B], [channels / 2]
// channels, half of them, order (0 sin_cos, 1 cos_sin, 2 interleaved), scale (float64)
template <class S> int timestep_embedding(const int64_t* a) {
    using namespace timestep_embedding_slots;
    const Geometry g(a);
    const Arguments view(a, 4);
    S* out = view(kOut).as<S>();
    const S *t = view(kT).as<const S>(), *frequencies = view(kFrequencies).as<const S>();
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
        case kNormal: return fill<normals>(a);
        case kRademacher: return fill<signs>(a);
        case kWords: return fill<raw_words>(a);
        case kStep: return wide ? step<double>(a) : step<float>(a);
        case kMeasureLangevin: return wide ? measure_langevin<double>(a) : measure_langevin<float>(a);
        case kPerturb: return wide ? perturb<double>(a) : perturb<float>(a);
        case kDsmLoss: return wide ? dsm_loss<double>(a) : dsm_loss<float>(a);
        case kDsmLossBackward: return wide ? dsm_loss_backward<double>(a) : dsm_loss_backward<float>(a);
        case kTimestepEmbedding: return wide ? timestep_embedding<double>(a) : timestep_embedding<float>(a);
        case kProbeDot: return wide ? probe_dot<double>(a) : probe_dot<float>(a);
        case kRkError: return wide ? rk_error<double>(a) : rk_error<float>(a);
        case kSumOfSquares: return wide ? sum_of_squares<double>(a) : sum_of_squares<float>(a);
        case kAdam: return wide ? adam<double>(a) : adam<float>(a);
        case kWinogradWeights: return winograd_weights(a);
        case kWinograd: return winograd(a);
        case kGroupNormSilu: return group_norm_silu(a);
    }
    return kDone;
}

}  // namespace
