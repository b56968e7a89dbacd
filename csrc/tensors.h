// A tensor argument of any dtype and strides, and its conversion, tile by tile, to contiguous numbers of the state's dtype.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// A tile: at most this many elements of one sample, or as many whole samples as fit.
constexpr int kTile = 2048;
constexpr int kMaxDims = 16;

enum Dtype : int64_t { kFloat32, kFloat64, kBfloat16, kFloat16, kBool, kInt64 };

inline float from_bfloat16(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

inline uint16_t to_bfloat16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline float from_float16(uint16_t v) {
#if defined(__F16C__)
    return _cvtsh_ss(v);
#else
    const uint32_t sign = uint32_t(v & 0x8000u) << 16, rest = v & 0x7FFFu;
    float out;
    if (rest >= 0x7C00u) {  // infinity, NaN
        const uint32_t bits = sign | 0x7F800000u | (rest & 0x3FFu) << 13;
        memcpy(&out, &bits, sizeof out);
        return out;
    }
    const uint32_t bits = rest << 13;  // its exponent is 112 too low: the product corrects it, for subnormals too
    memcpy(&out, &bits, sizeof out);
    out *= 0x1p112f;
    return sign ? -out : out;
#endif
}

inline uint16_t to_float16(float v) {
#if defined(__F16C__)
    return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return sign | 0x7E00u;
    if (bits >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more round to infinity
    float size;
    memcpy(&size, &bits, sizeof size);
    if (bits < 0x38800000u) {  // below 2^-14: whole multiples of 2^-24, rounded by the sum
        size += 0.5f;
        memcpy(&bits, &size, sizeof bits);
        return uint16_t(sign | (bits - 0x3F000000u));
    }
    bits += 0xFFFu + ((bits >> 13) & 1u);
    return uint16_t(sign | ((bits - 0x38000000u) >> 13));
#endif
}

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline void convert(float v, float& out) { out = v; }
inline void convert(float v, double& out) { out = v; }
inline void convert(double v, float& out) { out = float(v); }
inline void convert(double v, double& out) { out = v; }
inline void convert(Bfloat16 v, float& out) { out = from_bfloat16(v.bits); }
inline void convert(Bfloat16 v, double& out) { out = from_bfloat16(v.bits); }
inline void convert(Float16 v, float& out) { out = from_float16(v.bits); }
inline void convert(Float16 v, double& out) { out = from_float16(v.bits); }
inline void convert(uint8_t v, float& out) { out = v; }
inline void convert(uint8_t v, double& out) { out = v; }
inline void convert(float v, Bfloat16& out) { out.bits = to_bfloat16(v); }
inline void convert(double v, Bfloat16& out) { out.bits = to_bfloat16(float(v)); }
inline void convert(float v, Float16& out) { out.bits = to_float16(v); }
inline void convert(double v, Float16& out) { out.bits = to_float16(float(v)); }

template <class From, class To>
inline void convert_run(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t n) {
    if (from_stride == 1 && to_stride == 1) {
#if defined(__F16C__)
        int64_t i = 0;
        if constexpr (sizeof(From) == 2 && sizeof(To) == 4) {
            if (__is_same(From, Float16))
                for (; i + 8 <= n; i += 8)
                    _mm256_storeu_ps((float*)to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
        }
        if constexpr (sizeof(From) == 4 && sizeof(To) == 2) {
            if (__is_same(To, Float16))
                for (; i + 8 <= n; i += 8)
                    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps((const float*)from + i), 0));
        }
        for (; i < n; ++i) convert(from[i], to[i]);
#else
        for (int64_t i = 0; i < n; ++i) convert(from[i], to[i]);
#endif
    } else {
        for (int64_t i = 0; i < n; ++i) convert(from[i * from_stride], to[i * to_stride]);
    }
}

// A tensor argument, [B, *] with D elements a sample; its axes merged as far as its strides allow.
struct View {
    char* data = nullptr;
    int64_t dtype = 0;
    int dims = 0;  // 0: contiguous
    int64_t size[kMaxDims], stride[kMaxDims];

    explicit operator bool() const { return data != nullptr; }
    template <class T> T* as() const { return reinterpret_cast<T*>(data); }

    // strides = shape + offset; offset 0: it is contiguous, and has none.
    static View of(char* data, int64_t dtype, int64_t offset, int64_t ndim, const int64_t* shape) {
        View view;
        view.data = data;
        view.dtype = dtype;
        if (offset == 0) return view;
        const int64_t* strides = shape + offset;
        for (int64_t axis = 0; axis < ndim; ++axis) {
            if (shape[axis] == 1) continue;
            const int last = view.dims - 1;
            if (view.dims && view.stride[last] == strides[axis] * shape[axis]) {
                view.size[last] *= shape[axis];
                view.stride[last] = strides[axis];
            } else {
                view.size[view.dims] = shape[axis];
                view.stride[view.dims++] = strides[axis];
            }
        }
        if (view.dims == 1 && view.stride[0] == 1) view.dims = 0;
        return view;
    }

    // Cuts elements first … first + n - 1 into pieces of one stride: run(offset of the piece in memory, its stride, its first
    // element's number in the tile, its length), in elements.
    template <class Run> void pieces(int64_t first, int64_t n, Run run) const {
        if (dims == 0) return run(first, int64_t(1), int64_t(0), n);
        int64_t index[kMaxDims], rest = first, offset = 0;
        for (int axis = dims - 1; axis >= 0; --axis) {
            index[axis] = rest % size[axis];
            rest /= size[axis];
            offset += index[axis] * stride[axis];
        }
        const int inner = dims - 1;
        for (int64_t done = 0; done < n;) {
            const int64_t left = size[inner] - index[inner], length = left < n - done ? left : n - done;
            run(offset, stride[inner], done, length);
            done += length;
            index[inner] += length;
            offset += length * stride[inner];
            for (int axis = inner; axis > 0 && index[axis] == size[axis]; --axis) {
                offset += stride[axis - 1] - index[axis] * stride[axis];
                index[axis] = 0;
                ++index[axis - 1];
            }
        }
    }

    template <class T, class S> void gather(int64_t first, int64_t n, S* out) const {
        pieces(first, n, [&](int64_t offset, int64_t step, int64_t at, int64_t length) {
            convert_run(as<const T>() + offset, step, out + at, 1, length);
        });
    }

    template <class T, class S> void scatter(int64_t first, int64_t n, const S* from) const {
        pieces(first, n, [&](int64_t offset, int64_t step, int64_t at, int64_t length) {
            convert_run(from + at, 1, as<T>() + offset, step, length);
        });
    }

    // Elements first … first + n - 1, contiguous and in the state's dtype: where they are already, or copied to `buffer`.
    template <class S> const S* read(int64_t first, int64_t n, S* buffer) const {
        if (dims == 0 && dtype == (sizeof(S) == 4 ? kFloat32 : kFloat64)) return as<const S>() + first;
        switch (dtype) {
            case kFloat32: gather<float>(first, n, buffer); break;
            case kFloat64: gather<double>(first, n, buffer); break;
            case kBfloat16: gather<Bfloat16>(first, n, buffer); break;
            case kFloat16: gather<Float16>(first, n, buffer); break;
            default: gather<uint8_t>(first, n, buffer);
        }
        return buffer;
    }

    template <class S> void write(int64_t first, int64_t n, const S* from) const {
        switch (dtype) {
            case kFloat32: scatter<float>(first, n, from); break;
            case kFloat64: scatter<double>(first, n, from); break;
            case kBfloat16: scatter<Bfloat16>(first, n, from); break;
            default: scatter<Float16>(first, n, from);
        }
    }
};

}  // namespace
