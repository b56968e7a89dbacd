// Sums over a sample as a fixed tree, the same for any tiles and threads.
#pragma once
#include <math.h>
#include <stdlib.h>

#include "tiles.h"

namespace {

// The sum of v[0 … n-1] by halves: v[i] + v[i + w/2] for i < w/2, and again, from w on, the power of two that is n or the next
// one after it; what is beyond n counts as 0. Overwrites v.
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

// The sum of element(0 … length - 1), of at most a block, by halves.
template <class Element> inline double block_sum(int length, Element element) {
    alignas(64) double v[kBlock];
    int left = length;
    if (length == kBlock) {  // the first three halvings without storing what they read
        constexpr int n = kBlock / 8;
        left = n;
        for (int i = 0; i < n; ++i) {
            const auto at = [&](int k) { return element(i + k * n); };
            v[i] = ((at(0) + at(4)) + (at(2) + at(6))) + ((at(1) + at(5)) + (at(3) + at(7)));
        }
    } else {
        for (int i = 0; i < length; ++i) v[i] = element(i);
    }
    return halve(v, left);
}

// Sums over each sample, from partial sums of blocks of 1024; `count` sums side by side.
struct Sums {
    double* partial;
    int64_t blocks, samples;
    int count;

    Sums(const Geometry& g, int count) : blocks((g.numel + kBlock - 1) / kBlock), samples(g.samples), count(count) {
        partial = static_cast<double*>(malloc(sizeof(double) * (size_t(blocks) * size_t(samples) * size_t(count) + 1)));
    }
    ~Sums() { free(partial); }
    Sums(const Sums&) = delete;
    explicit operator bool() const { return partial != nullptr; }  // false: there is no memory

    // Adds the tile's elements, given by `element(i)`, to sum number `which`.
    template <class Element> void add(const Tile& tile, int which, Element element) {
        const int each = int(tile.n / tile.samples);
        if (each <= 4 && blocks == 1) return add_small(tile, which, element, each);
        for (int64_t s = 0; s < tile.samples; ++s)
            for (int from = 0; from < each; from += kBlock) {
                const int length = each - from < kBlock ? each - from : kBlock, offset = int(s) * each + from;
                const int64_t block = (tile.element + from) / kBlock;
                partial[((tile.sample + s) * count + which) * blocks + block] =
                    block_sum(length, [&](int i) { return element(offset + i); });
            }
    }
    // The same tree over samples of so few elements that its loops would cost more than its sums.
    template <class Element> void add_small(const Tile& tile, int which, Element element, int each) {
        double* to = partial + tile.sample * count + which;
        for (int64_t s = 0; s < tile.samples; ++s, to += count) {
            const int at = int(s) * each;
            const double a = element(at);
            if (each == 1) *to = a;
            if (each == 2) *to = a + element(at + 1);
            if (each == 3) *to = (a + element(at + 2)) + element(at + 1);
            if (each == 4) *to = (a + element(at + 2)) + (element(at + 1) + element(at + 3));
        }
    }
    // The sum of a sample. Once for each: it overwrites the partial sums.
    double total(int64_t sample, int which) {
        double* sums = partial + (sample * count + which) * blocks;
        return blocks == 1 ? *sums : halve(sums, blocks);
    }
};

}  // namespace
