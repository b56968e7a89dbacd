// Layers of a network on float32 tensors whose channels lie side by side (torch's channels_last), for inference: convolutions of
// 3×3 by Winograd's method, and group normalisation with SiLU. A call is addresses and sizes, in the order named at each.
#pragma once
#include <math.h>
#include <string.h>

#include "step.h"

namespace {

constexpr int kLanes = 16;  // channels that are worked on at once

template <class Body> struct Span {
    const Body* body;
    static void run(int64_t begin, int64_t end, void* self) { (*static_cast<Span*>(self)->body)(begin, end); }
};

// body(begin, end) on torch's threads, where `size` elements for each of `count` are worth them; a Result.
template <class Body> int spread(int64_t count, int64_t size, const Body& body) {
    constexpr int64_t kWorthAThread = 16384;
    Span<Body> span{&body};
    if (count <= 0) return kDone;
    if (fastdiff_parallel_for && count > 1 && count * size >= 2 * kWorthAThread)
        return fastdiff_parallel_for(0, count, (kWorthAThread + size - 1) / size, Span<Body>::run, &span) ? kThreads : kDone;
    body(0, count);
    return kDone;
}

// Winograd's convolution of 3×3 (Lavin & Gray 2016, F(4×4, 3×3)): tiles of 4×4 are made of 6×6, each of whose 36 numbers is a product
// of matrices, tiles × inputs times inputs × outputs, after and before a linear map of the tile: a quarter of the multiplications.
using Lanes = float[kLanes];
constexpr int kPoints = 36;
constexpr int kColumns = 2 * Vector::lanes;              // of the product at once
constexpr int kRows = Vector::lanes == 16 ? 12 : 6;      // as many as there are registers for

// Bᵀ d of six numbers that lie `s` apart, to six that lie `t` apart
inline void winograd_into(const Lanes* d, int s, Lanes* o, int t) {
FASTDIFF_INDEPENDENT
    for (int c = 0; c < kLanes; ++c) {
        const float d0 = d[0][c], d1 = d[s][c], d2 = d[2 * s][c], d3 = d[3 * s][c], d4 = d[4 * s][c], d5 = d[5 * s][c];
        const float even = fma(-4.f, d2, d4), odd = fma(-4.f, d1, d3), far = d4 - d2, near = 2 * (d3 - d1);
        o[0][c] = fma(4.f, d0, fma(-5.f, d2, d4));
        o[t][c] = even + odd, o[2 * t][c] = even - odd;
        o[3 * t][c] = far + near, o[4 * t][c] = far - near;
        o[5 * t][c] = fma(4.f, d1, fma(-5.f, d3, d5));
    }
}

// Aᵀ m of six numbers to four
inline void winograd_out_of(const Lanes* m, int s, Lanes* o, int t) {
FASTDIFF_INDEPENDENT
    for (int c = 0; c < kLanes; ++c) {
        const float sum = m[s][c] + m[2 * s][c], apart = m[s][c] - m[2 * s][c];
        const float far = m[3 * s][c] + m[4 * s][c], wide = m[3 * s][c] - m[4 * s][c];
        o[0][c] = m[0][c] + sum + far;
        o[t][c] = fma(2.f, wide, apart);
        o[2 * t][c] = fma(4.f, far, sum);
        o[3 * t][c] = fma(8.f, wide, apart) + m[5 * s][c];
    }
}

struct Convolution {
    int64_t samples, height, width, inputs, outputs, down, across, panels;
    explicit Convolution(const int64_t* a)
        : samples(a[0]), height(a[1]), width(a[2]), inputs(a[3]), outputs(a[4]), down((height + 3) / 4), across((width + 3) / 4),
          panels((outputs + kColumns - 1) / kColumns) {}
    int64_t tiles() const { return samples * down * across; }
    int64_t padded() const { return panels * kColumns; }  // outputs
    // tile t: its sample, and its place there
    int64_t at(int64_t t, int64_t& y, int64_t& x) const {
        y = t / across % down * 4, x = t % across * 4;
        return t / (down * across);
    }
};

// Channels `from` … of a tile of x to its place in v [36, tiles, inputs]; n of them, kLanes where that is known.
template <bool full> inline void tile_into(const Convolution& g, const float* x, float* v, int64_t step, int64_t y, int64_t z, int n) {
    alignas(64) Lanes d[kPoints], e[kPoints];
    const size_t bytes = full ? sizeof(Lanes) : sizeof(float) * size_t(n);
    for (int r = 0; r < 6; ++r)
        for (int q = 0; q < 6; ++q) {
            const bool inside = y + r >= 1 && y + r <= g.height && z + q >= 1 && z + q <= g.width;
            if (!inside || !full) memset(d[r * 6 + q], 0, sizeof(Lanes));
            if (inside) memcpy(d[r * 6 + q], x + ((y + r - 1) * g.width + z + q - 1) * g.inputs, bytes);
        }
    for (int q = 0; q < 6; ++q) winograd_into(d + q, 6, e + q, 6);
    for (int r = 0; r < 6; ++r) winograd_into(e + 6 * r, 1, d + 6 * r, 1);
    for (int k = 0; k < kPoints; ++k) memcpy(v + k * step, d[k], bytes);
}

template <bool full> inline void tile_out(const Convolution& g, const float* m, int64_t step, const float* bias, float* out,
                                          int64_t y, int64_t z, int n) {
    alignas(64) Lanes d[kPoints], e[24], o[16], added = {};
    const size_t bytes = full ? sizeof(Lanes) : sizeof(float) * size_t(n);
    if (!full) memset(d, 0, sizeof(d));
    for (int k = 0; k < kPoints; ++k) memcpy(d[k], m + k * step, bytes);
    if (bias) memcpy(added, bias, bytes);
    for (int q = 0; q < 6; ++q) winograd_out_of(d + q, 6, e + q, 6);
    for (int r = 0; r < 4; ++r) winograd_out_of(e + 6 * r, 1, o + 4 * r, 1);
    for (int r = 0; r < 4 && y + r < g.height; ++r)
        for (int q = 0; q < 4 && z + q < g.width; ++q) {
            float* line = o[r * 4 + q];
FASTDIFF_INDEPENDENT
            for (int c = 0; c < kLanes; ++c) line[c] += added[c];
            memcpy(out + ((y + r) * g.width + z + q) * g.outputs, line, bytes);
        }
}

// c [rows, kColumns] = a [rows, depth] b [depth, kColumns]; lines of a and c lie `depth` and `step` apart.
template <int rows> inline void product(const float* a, const float* b, int64_t depth, float* c, int64_t step) {
    typename Vector::Floats sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = Vector::constant(0.f);
    for (int64_t k = 0; k < depth; ++k) {
        const auto left = Vector::load(b + k * kColumns), right = Vector::load(b + k * kColumns + Vector::lanes);
        for (int r = 0; r < rows; ++r) {
            const auto factor = Vector::constant(a[r * depth + k]);
            sum[r][0] = Vector::fma_of_any(factor, left, sum[r][0]), sum[r][1] = Vector::fma_of_any(factor, right, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; ++r)
        Vector::store(c + r * step, sum[r][0]), Vector::store(c + r * step + Vector::lanes, sum[r][1]);
}

inline void product_of(int64_t rows, const float* a, const float* b, int64_t depth, float* c, int64_t step) {
    for (; rows >= kRows; rows -= kRows, a += kRows * depth, c += kRows * step) product<kRows>(a, b, depth, c, step);
    for (; rows >= 4; rows -= 4, a += 4 * depth, c += 4 * step) product<4>(a, b, depth, c, step);
    for (; rows > 0; --rows, a += depth, c += step) product<1>(a, b, depth, c, step);
}

// The calling thread's memory of at least so many floats, which stays until the thread ends; null: there is none.
inline float* layer_memory(int64_t floats) {
    struct Kept {
        void* memory = nullptr;
        int64_t floats = 0;
        ~Kept() { free(memory); }
    };
    static thread_local Kept kept;
    if (kept.floats < floats) {
        free(kept.memory);
        kept.floats = posix_memalign(&kept.memory, 64, sizeof(float) * size_t(floats)) == 0 ? floats : 0;
        if (!kept.floats) kept.memory = nullptr;
    }
    return static_cast<float*>(kept.memory);
}

// (samples, height, width), inputs, outputs; w [O, C, 3, 3], packed [36, panels, C, kColumns]: G w Gᵀ
inline int winograd_weights(const int64_t* a) {
    const Convolution g(a);
    const float* w = reinterpret_cast<const float*>(a[5]);
    float* packed = reinterpret_cast<float*>(a[6]);
    const double G[6][3] = {{1 / 4., 0, 0}, {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
                            {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
    return spread(g.panels * g.inputs, kPoints * kColumns, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t panel = task / g.inputs, c = task % g.inputs;
            for (int64_t o = 0; o < kColumns; ++o) {
                const int64_t output = panel * kColumns + o;
                double half[6][3] = {};
                if (output < g.outputs)
                    for (int i = 0; i < 6; ++i)
                        for (int q = 0; q < 3; ++q)
                            for (int r = 0; r < 3; ++r) half[i][q] += G[i][r] * double(w[((output * g.inputs + c) * 3 + r) * 3 + q]);
                for (int i = 0; i < 6; ++i)
                    for (int j = 0; j < 6; ++j) {
                        const double value = half[i][0] * G[j][0] + half[i][1] * G[j][1] + half[i][2] * G[j][2];
                        packed[(((i * 6 + j) * g.panels + panel) * g.inputs + c) * kColumns + o] = float(value);
                    }
            }
        }
    });
}

// samples, height, width, inputs, outputs; x [B, H, W, C], packed, bias [O] or 0, y [B, H, W, O]
inline int winograd(const int64_t* a) {
    const Convolution g(a);
    const float *x = reinterpret_cast<const float*>(a[5]), *packed = reinterpret_cast<const float*>(a[6]);
    const float* bias = reinterpret_cast<const float*>(a[7]);
    float* out = reinterpret_cast<float*>(a[8]);
    constexpr int64_t kBudget = 1 << 20;  // floats of what lies between, which a cache should hold
    const int64_t tiles = g.tiles(), each = kPoints * (g.inputs + g.padded());
    int64_t most = kBudget / each / kRows * kRows;
    most = most < 2 * kRows ? 2 * kRows : most;
    if (most > tiles) most = tiles;
    float* memory = layer_memory(each * most);
    if (!memory && tiles) return kNoMemory;
    for (int64_t first = 0; first < tiles; first += most) {
        const int64_t count = tiles - first < most ? tiles - first : most;
        float *v = memory, *m = memory + kPoints * count * g.inputs;
        int fault = spread(count, kPoints * g.inputs, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) {
                int64_t y, z;
                const float* image = x + g.at(first + t, y, z) * g.height * g.width * g.inputs;
                int64_t c = 0;
                for (; c + kLanes <= g.inputs; c += kLanes)
                    tile_into<true>(g, image + c, v + t * g.inputs + c, count * g.inputs, y, z, kLanes);
                if (c < g.inputs) tile_into<false>(g, image + c, v + t * g.inputs + c, count * g.inputs, y, z, int(g.inputs - c));
            }
        });
        if (!fault)
            fault = spread(kPoints * g.panels, count * g.inputs * kColumns, [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) {
                    const int64_t point = task / g.panels, panel = task % g.panels;
                    product_of(count, v + point * count * g.inputs, packed + task * g.inputs * kColumns, g.inputs,
                               m + point * count * g.padded() + panel * kColumns, g.padded());
                }
            });
        if (!fault)
            fault = spread(count, kPoints * g.outputs, [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; ++t) {
                    int64_t y, z;
                    float* image = out + g.at(first + t, y, z) * g.height * g.width * g.outputs;
                    const float* from = m + t * g.padded();
                    int64_t c = 0;
                    for (; c + kLanes <= g.outputs; c += kLanes)
                        tile_out<true>(g, from + c, count * g.padded(), bias ? bias + c : nullptr, image + c, y, z, kLanes);
                    if (c < g.outputs)
                        tile_out<false>(g, from + c, count * g.padded(), bias ? bias + c : nullptr, image + c, y, z,
                                        int(g.outputs - c));
                }
            });
        if (fault) return fault;
    }
    return kDone;
}

// Sums are of what lies apart from each channel's first number, so that large means cost no digits.
// samples, pixels, channels, groups, eps (float64), whether SiLU follows, gain's and shift's step from sample to sample (0: the same
// for all); x, gain, shift [B or 1, C], y [B, pixels, C]
inline int group_norm_silu(const int64_t* a) {
    const int64_t samples = a[0], pixels = a[1], channels = a[2], groups = a[3], each = channels / groups;
    const double eps = *reinterpret_cast<const double*>(a + 4);
    const bool silu = a[5] != 0;
    const int64_t step = a[6];
    const float *x = reinterpret_cast<const float*>(a[7]), *gain = reinterpret_cast<const float*>(a[8]);
    const float* shift = reinterpret_cast<const float*>(a[9]);
    float* y = reinterpret_cast<float*>(a[10]);
    // whole groups of 64 channels or so at a time: a line of the cache is read once
    int64_t together = 1;
    while (together < groups && (groups % (2 * together) == 0) && together * each < 64) together *= 2;
    const int64_t width = together * each, parts = groups / together;
    float* memory = static_cast<float*>(malloc(sizeof(float) * size_t(2 * samples * channels + 1)));
    double* sums = static_cast<double*>(malloc(sizeof(double) * size_t(2 * samples * channels + 1)));
    if (!memory || !sums) {
        free(memory), free(sums);
        return kNoMemory;
    }
    const int fault = spread(samples * parts, pixels * width, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t sample = task / parts, from = task % parts * width;
            const float* in = x + sample * pixels * channels + from;
            float *out = y + sample * pixels * channels + from, *a_ = memory + 2 * (sample * channels + from), *b_ = a_ + width;
            double *total = sums + 2 * (sample * channels + from), *square = total + width;
            for (int64_t c = 0; c < 2 * width; ++c) total[c] = 0;
            constexpr int64_t kRows = 32;  // added up in float32
            for (int64_t row = 0; row < pixels; row += kRows) {
                const int64_t rows = pixels - row < kRows ? pixels - row : kRows;
                for (int64_t c = 0; c < 2 * width; ++c) a_[c] = 0;
                for (int64_t r = row; r < row + rows; ++r) {
                    const float* line = in + r * channels;
FASTDIFF_INDEPENDENT
                    for (int64_t c = 0; c < width; ++c) {
                        const float apart = line[c] - in[c];
                        a_[c] += apart, b_[c] = fma(apart, apart, b_[c]);
                    }
                }
                for (int64_t c = 0; c < width; ++c) total[c] += a_[c], square[c] += b_[c];
            }
            for (int64_t g = 0; g < together; ++g) {
                double mean = 0, second = 0;
                for (int64_t c = g * each; c < (g + 1) * each; ++c) {
                    total[c] /= double(pixels);
                    second += square[c] - double(pixels) * total[c] * total[c];
                    mean += double(in[c]) + total[c];
                }
                mean /= double(each);
                for (int64_t c = g * each; c < (g + 1) * each; ++c) {
                    const double from_mean = double(in[c]) + total[c] - mean;
                    second += double(pixels) * from_mean * from_mean;
                }
                second /= double(pixels * each);
                const double scale = 1 / sqrt((second > 0 ? second : second == second ? 0 : second) + eps);
                for (int64_t c = g * each; c < (g + 1) * each; ++c) {
                    const double w = double(gain[sample * step + from + c]) * scale;
                    a_[c] = float(w), b_[c] = float(double(shift[sample * step + from + c]) + w * (double(in[c]) - mean));
                }
            }
            for (int64_t r = 0; r < pixels; ++r) {
                const float* line = in + r * channels;
                float* to = out + r * channels;
                if (silu) {
FASTDIFF_INDEPENDENT
                    for (int64_t c = 0; c < width; ++c) {
                        const float v = fma(line[c] - in[c], a_[c], b_[c]);
                        to[c] = v / (1.f + exponential(-v));
                    }
                } else {
FASTDIFF_INDEPENDENT
                    for (int64_t c = 0; c < width; ++c) to[c] = fma(line[c] - in[c], a_[c], b_[c]);
                }
            }
        }
    });
    free(memory), free(sums);
    return fault;
}

}  // namespace
