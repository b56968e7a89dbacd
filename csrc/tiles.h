// How a call's tensors are cut into tiles that fit the first cache, and the loop over tiles on torch's threads.
#pragma once
#include "fastdiff.h"
#include "noise.h"
#include "tensors.h"

namespace {

struct Geometry {
    int64_t samples, numel;  // of one sample
    int64_t ndim;
    const int64_t* shape;

    // a[0 … 3]: the index in `a` of the first axis' length, samples, elements of a sample, axes
    explicit Geometry(const int64_t* a) : samples(a[1]), numel(a[2]), ndim(a[3]), shape(a + a[0]) {}
    int64_t per_tile() const { return numel >= kTile ? 1 : numel ? kTile / numel : 1; }
    int64_t tiles_per_sample() const { return numel >= kTile ? (numel + kTile - 1) / kTile : 1; }
    int64_t tiles() const {
        if (numel == 0) return 0;
        return numel >= kTile ? samples * tiles_per_sample() : (samples + per_tile() - 1) / per_tile();
    }
};

struct Tile {
    int64_t sample, samples;  // its first sample, and how many (if more than one, whole samples)
    int64_t element;          // its first element's number in its first sample
    int64_t first;            // its first element's number in the tensor
    int n;                    // elements

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

static_assert(kTile % 2048 == 0, "signs (fill.h) take blocks of 2048 elements, sums (sums.h) blocks of 1024");
static_assert(kMaxTensors >= 4 + kMaxStages && (kMaxTensors & (kMaxTensors - 1)) == 0, "slots of rk_error, and a power of two");

struct Cursor {
    int64_t row;
    uint32_t first_sample;
    uint64_t seed;

    explicit Cursor(const int64_t* p) : row(p[0]), first_sample(uint32_t(p[1])), seed(uint64_t(p[2])) {}
    Source source(int64_t stream) const { return Source(seed, uint32_t(row), uint32_t(stream)); }
};

constexpr int kHeader = 4;  // numbers of a Geometry
// The tensors of a call, by their slots. After the geometry and `scalars` numbers stand two for each tensor that is present:
// its address (0: it is absent after all), and slot + 2^8·dtype + 2^16·(the offset from the shape to its strides, 0 if it is
// contiguous).
struct Arguments {
    const int64_t* entry[kMaxTensors] = {};
    Geometry g;

    Arguments(const int64_t* a, int scalars) : g(a) {
        for (const int64_t* e = a + kHeader + scalars; e < a + a[0]; e += 2) entry[e[1] & (kMaxTensors - 1)] = e;
    }
    int64_t dtype(int i) const { return entry[i][1] >> 8 & 255; }
    View operator()(int i) const {
        if (!entry[i]) return View();
        return View::of(reinterpret_cast<char*>(entry[i][0]), dtype(i), entry[i][1] >> 16, g.ndim, g.shape);
    }
    // Whether tensors from … to that are present have a floating dtype.
    bool floating(int from, int to) const {
        for (int i = from; i <= to; ++i)
            if (entry[i] && dtype(i) > kFloat16) return false;
        return true;
    }
    // Whether tensor i is contiguous and of this dtype.
    bool plain(int i, int64_t wanted) const { return entry[i][1] >> 8 == wanted; }
};

template <class Body> struct Range {
    const Geometry* g;
    const Body* body;
    int without_memory;  // threads that had none
    static void run(int64_t begin, int64_t end, void* self) {
        Range* range = static_cast<Range*>(self);
        void* scratch = fastdiff_scratch();
        if (!scratch) {
            __atomic_store_n(&range->without_memory, 1, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t index = begin; index < end; ++index) (*range->body)(Tile(*range->g, index), scratch);
    }
};

// The buffers of an operation's tiles, in the thread's scratch memory.
template <class Buffers> Buffers& in(void* scratch) {
    static_assert(sizeof(Buffers) <= kScratch, "kScratch is too small");
    static_assert(alignof(Buffers) <= 64, "scratch memory is aligned to 64 bytes");
    return *static_cast<Buffers*>(scratch);
}

// body(tile, scratch) for all tiles, on torch's own threads where there is work for more than one; a Result.
template <class Body> int each_tile(const Geometry& g, const Body& body) {
    Range<Body> range{&g, &body, 0};
    const int64_t tiles = g.tiles(), size = g.numel >= kTile ? kTile : g.per_tile() * g.numel;
    constexpr int64_t kWorthAThread = 16384;
    if (tiles == 0) return kDone;
    int failed = 0;
    if (fastdiff_parallel_for && tiles * size >= 2 * kWorthAThread)
        failed = fastdiff_parallel_for(0, tiles, (kWorthAThread + size - 1) / size, Range<Body>::run, &range);
    else
        Range<Body>::run(0, tiles, &range);
    return range.without_memory ? kNoMemory : failed ? kThreads : kDone;
}

}  // namespace
