// Numbers as they are kept in memory (T), and what they are computed with (Real<T>): bfloat16 is kept, and float computes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
    BFloat16(float x) {  // to the nearest one, ties to even
        uint32_t whole;
        std::memcpy(&whole, &x, sizeof whole);
        bits = x == x ? uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16) : 0x7fc0;
    }
    operator float() const {
        const uint32_t whole = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &whole, sizeof x);
        return x;
    }
};

template <class T> struct RealOf { typedef T type; };
template <> struct RealOf<BFloat16> { typedef float type; };

template <class T> using Real = typename RealOf<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(Real<T>));
template <class R> struct VectorOf { typedef R type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<Real<T>>::type;

template <class T> inline Vector<T> load(const T *from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T> inline void store(T *to, Vector<T> v) { std::memcpy(to, &v, sizeof v); }

typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));

template <> inline Vector<float> load(const BFloat16 *from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof half);
    const Bits whole = __builtin_convertvector(half, Bits) << 16;
    Vector<float> v;
    std::memcpy(&v, &whole, sizeof v);
    return v;
}

template <> inline void store(BFloat16 *to, Vector<float> v) {
    Bits whole;
    std::memcpy(&whole, &v, sizeof whole);
    const Bits rounded = (whole + 0x7fff + (whole >> 16 & 1)) >> 16, nan = Bits{} + 0x7fc0;
    const HalfBits half = __builtin_convertvector(v == v ? rounded : nan, HalfBits);
    std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes, the others 0.
template <class T> inline Vector<T> load_part(const T *from, int64_t count) {
    T padded[LANES<T>];
    std::memset(static_cast<void *>(padded), 0, sizeof padded);
    std::memcpy(static_cast<void *>(padded), from, count * sizeof(T));
    return load(padded);
}

template <class T> inline void store_part(T *to, Vector<T> v, int64_t count) {
    T padded[LANES<T>];
    store(padded, v);
    std::memcpy(static_cast<void *>(to), padded, count * sizeof(T));
}
