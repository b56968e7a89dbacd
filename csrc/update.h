// A training's update of its weights: operations on lists of tensors, each in one piece of memory, all float32 or all float64.
// A call is the number of tensors, some scalars, and for each tensor its elements and its address in every list, by the slots.
#pragma once
#include <math.h>

#include "sums.h"

namespace {

// Blocks of 1024 elements, of which none lies in two tensors.
struct Lists {
    int64_t count;
    const int64_t* entries;  // of all tensors: elements, addresses
    int stride;              // numbers of an entry
    int64_t* first;          // the number of each tensor's first block [count + 1]

    Lists(const int64_t* a, int scalars, int lists) : count(a[0]), entries(a + 1 + scalars), stride(1 + lists) {
        first = static_cast<int64_t*>(malloc(sizeof(int64_t) * size_t(count + 1)));
        if (!first) return;
        first[0] = 0;
        for (int64_t k = 0; k < count; ++k) first[k + 1] = first[k] + (entries[k * stride] + kBlock - 1) / kBlock;
    }
    ~Lists() { free(first); }
    Lists(const Lists&) = delete;
    explicit operator bool() const { return first != nullptr; }  // false: there is no memory
    int64_t blocks() const { return first[count]; }
};

// Where a block lies: its tensor's entry, its first element there, its elements.
struct Block {
    const int64_t* entry;
    int64_t from;
    int n;

    Block(const Lists& lists, int64_t tensor, int64_t index) : entry(lists.entries + tensor * lists.stride) {
        from = (index - lists.first[tensor]) * kBlock;
        n = int(entry[0] - from < kBlock ? entry[0] - from : kBlock);
    }
    template <class S> S* at(int slot) const { return reinterpret_cast<S*>(entry[1 + slot]) + from; }
};

template <class Body> struct Blocks {
    const Lists* lists;
    const Body* body;
    static void run(int64_t begin, int64_t end, void* self) {
        const Blocks* blocks = static_cast<Blocks*>(self);
        const Lists& lists = *blocks->lists;
        int64_t low = 0, high = lists.count;  // the last tensor that begins with `begin` or before it
        while (high - low > 1) (lists.first[(low + high) / 2] <= begin ? low : high) = (low + high) / 2;
        for (int64_t index = begin; index < end; ++index) {
            while (lists.first[low + 1] <= index) ++low;
            (*blocks->body)(Block(lists, low, index), index);
        }
    }
};

// body(block, its number) for all blocks, on torch's own threads where there is work for more than one; a Result.
template <class Body> int each_block(const Lists& lists, const Body& body) {
    Blocks<Body> blocks{&lists, &body};
    constexpr int64_t kGrain = 16;  // of blocks: 16384 elements are worth a thread
    if (lists.blocks() == 0) return kDone;
    if (fastdiff_parallel_for && lists.blocks() >= 2 * kGrain)
        return fastdiff_parallel_for(0, lists.blocks(), kGrain, Blocks<Body>::run, &blocks) ? kThreads : kDone;
    Blocks<Body>::run(0, lists.blocks(), &blocks);
    return kDone;
}

namespace sum_of_squares_slots { enum { kTensors }; }
// the address of the result, float64
template <class S> int sum_of_squares(const int64_t* a) {
    using namespace sum_of_squares_slots;
    const Lists lists(a, 1, 1);
    if (!lists) return kNoMemory;
    double* partial = static_cast<double*>(malloc(sizeof(double) * size_t(lists.blocks() + 1)));
    if (!partial) return kNoMemory;
    const int fault = each_block(lists, [&](const Block& block, int64_t index) {
        const S* v = block.at<const S>(kTensors);
        partial[index] = block_sum(block.n, [&](int i) { return double(v[i]) * double(v[i]); });
    });
    *reinterpret_cast<double*>(a[1]) = halve(partial, lists.blocks());
    free(partial);
    return fault;
}

namespace adam_slots { enum { kWeights, kGradients, kFirst, kSecond, kAverage }; }
template <class S> struct Adam {
    S factor, new1, beta2, new2, eps, decay, kept, size, root, share;

    // By value, as the compiler must not think that what is written may be one of these.
    void run(const Block& block) const { run(*this, block); }
    static void run(const Adam by, const Block& block) {
        using namespace adam_slots;
        S *w = block.at<S>(kWeights), *m = block.at<S>(kFirst), *v = block.at<S>(kSecond), *e = block.at<S>(kAverage);
        const S* g = block.at<const S>(kGradients);
        // where an average takes most, from the other end, so that a share of 1 gives the weight itself
        const bool most = by.share >= S(0.5);
        const S share = most ? 1 - by.share : by.share;
FASTDIFF_INDEPENDENT
        for (int i = 0; i < block.n; ++i) {
            const S gradient = g[i] * by.factor + by.decay * w[i];
            const S mean = m[i] + by.new1 * (gradient - m[i]);
            const S square = v[i] * by.beta2 + by.new2 * gradient * gradient;
            const S weight = w[i] * by.kept - by.size * (mean / (S(sqrt(square)) / by.root + by.eps));
            const S from = most ? weight : e[i], apart = most ? e[i] - weight : weight - e[i];
            m[i] = mean, v[i] = square, w[i] = weight, e[i] = from + share * apart;
        }
    }
};

// as float64: what the gradient is multiplied by, beta1, beta2, eps, what it takes of the weight, what a weight keeps of itself,
// lr/(1 - beta1^n), √(1 - beta2^n), what the average takes of the weight
template <class S> int adam(const int64_t* a) {
    const Lists lists(a, 9, 5);
    if (!lists) return kNoMemory;
    const double* s = reinterpret_cast<const double*>(a + 1);
    const Adam<S> adam{S(s[0]), S(1 - s[1]), S(s[2]), S(1 - s[2]), S(s[3]), S(s[4]), S(s[5]), S(s[6]), S(s[7]), S(s[8])};
    return each_block(lists, [&](const Block& block, int64_t) { adam.run(block); });
}

}  // namespace
