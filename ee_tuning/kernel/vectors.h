// Vectors of the processor's width, and what layers are made of: products with a matrix, e^x, norms.
//
// Every number is summed in an order that depends on its own token alone: a token's states are the same bits in any company.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include <omp.h>

#include "numbers.h"

// Rows of a matrix that are read together, and the most tokens that read them so: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int BLOCK = 4, TOKENS = 6;
#elif defined(__AVX__)
constexpr int BLOCK = 2, TOKENS = 4;
#else
constexpr int BLOCK = 4, TOKENS = 4;
#endif

enum Activation { SILU, GELU, GELU_TANH, RELU };

template <int K> using Tokens = std::integral_constant<int, K>;

template <class T, int... I> inline Vector<T> neighbours_summed(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
    typedef typename std::conditional<sizeof(Real<T>) == 4, int32_t, int64_t>::type Index;
    typedef Index Indices __attribute__((vector_size(VECTOR_BYTES)));
    return __builtin_shuffle(a, b, Indices{(2 * I)...}) + __builtin_shuffle(a, b, Indices{(2 * I + 1)...});
#endif
}

// The sum of each of N vectors, in lanes 0 .. N - 1. Lanes are summed as a tree, the same one whatever N is.
template <class T, int N> inline Vector<T> sums(Vector<T> (&v)[N]) {
    static_assert(N <= LANES<T> && (N & (N - 1)) == 0, "a power of two that fits a vector");
    constexpr auto lanes = std::make_integer_sequence<int, LANES<T>>{};
    int count = N;
#pragma GCC unroll 8
    for (int width = LANES<T>; width > 1; width /= 2) {
        const int pairs = count > 1 ? count / 2 : 1;
#pragma GCC unroll 8
        for (int i = 0; i < pairs; ++i) v[i] = neighbours_summed<T>(v[2 * i % count], v[(2 * i + 1) % count], lanes);
        count = pairs;
    }
    return v[0];
}

// Products of R rows of a matrix with K tokens: take(row, token, product). Meanwhile fetches what is read next: from `next` on, `step` numbers
// further with each vector. X is what tokens are kept in, T what the matrix is.
template <class T, int R, int K, class X, class Take>
inline void block_product(const X *x, int64_t x_stride, const T *w, int64_t w_stride, int64_t size, const T *next, int64_t step, Take take) {
    constexpr int SUMMED = R < LANES<T> ? R : LANES<T>;
    Vector<T> acc[K][R] = {};
    int64_t i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>, next += step) {
        Vector<T> weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            weights[r] = load(w + r * w_stride + i);
            __builtin_prefetch(next + r * w_stride);
        }
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector<T> tokens = load(x + k * x_stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[k][r] += weights[r] * tokens;
        }
    }
    if (i < size)  // as vectors too: what a compiler makes of single numbers, fused or not, may differ from one R and K to another
        for (int k = 0; k < K; ++k) {
            const Vector<T> tokens = load_part(x + k * x_stride + i, size - i);
            for (int r = 0; r < R; ++r) acc[k][r] += load_part(w + r * w_stride + i, size - i) * tokens;
        }
    for (int k = 0; k < K; ++k)
        for (int part = 0; part < R; part += SUMMED) {
            const Vector<T> products = sums<T, SUMMED>(reinterpret_cast<Vector<T>(&)[SUMMED]>(acc[k][part]));
            for (int r = 0; r < SUMMED; ++r) take(part + r, k, products[r]);
        }
}

// The same for any number of tokens, in groups of about the same size, each of which fetches its share of the next rows.
template <class T, int R, class X, class Take>
inline void rows_product(const X *x, int64_t num_tokens, int64_t x_stride, const T *w, int64_t w_stride, int64_t size, Take take) {
    const int64_t groups = (num_tokens + TOKENS - 1) / TOKENS;
    for (int64_t group = 0, first = 0, end; group < groups; ++group, first = end) {
        end = num_tokens * (group + 1) / groups;
        const auto shifted = [&](int r, int token, Real<T> product) { take(r, first + token, product); };
        const auto go = [&](auto K) {
            block_product<T, R, K>(x + first * x_stride, x_stride, w, w_stride, size, w + R * w_stride + size * group / groups,
                                   (LANES<T> + groups - 1) / groups, shifted);
        };
        switch (end - first) {
            case 1: go(Tokens<1>{}); break;
            case 2: go(Tokens<2>{}); break;
            case 3: go(Tokens<3>{}); break;
            case 4: go(Tokens<4>{}); break;
            case 5: go(Tokens<std::min(5, TOKENS)>{}); break;
            default: go(Tokens<TOKENS>{});
        }
    }
}

// Rows first .. last - 1 of W [., size] times each of x [t, size]: take(row, token, product).
template <class T, class X, class Take>
void product(const X *x, int64_t num_tokens, int64_t x_stride, const T *w, int64_t w_stride, int64_t size, int64_t first, int64_t last,
             Take take) {
    int64_t row = first;
    for (; row + BLOCK <= last; row += BLOCK)
        rows_product<T, BLOCK>(x, num_tokens, x_stride, w + row * w_stride, w_stride, size,
                               [&](int r, int64_t k, Real<T> p) { take(row + r, k, p); });
    for (; row < last; ++row)
        rows_product<T, 1>(x, num_tokens, x_stride, w + row * w_stride, w_stride, size, [&](int, int64_t k, Real<T> p) { take(row, k, p); });
}

// This thread's share of `count` rows, in whole blocks.
struct Share {
    int64_t first, last;
    explicit Share(int64_t count) {
        const int64_t blocks = (count + BLOCK - 1) / BLOCK, threads = omp_get_num_threads(), own = omp_get_thread_num();
        first = std::min(count, blocks * own / threads * BLOCK);
        last = std::min(count, blocks * (own + 1) / threads * BLOCK);
    }
    Share(int64_t first, int64_t last) : first(first), last(last) {}
};

// out [t, rows] = x [t, size] Wᵀ + bias + residual, the share's rows of it.
template <class T, class X, class Out>
void linear(const X *x, int64_t num_tokens, int64_t size, const T *weight, const T *bias, const T *residual, Out *out, int64_t rows,
            Share share) {
    product<T>(x, num_tokens, size, weight, size, size, share.first, share.last, [&](int64_t row, int64_t k, Real<T> p) {
        if (bias) p += Real<T>(bias[row]);
        out[k * rows + row] = Out(residual ? p + Real<T>(residual[k * rows + row]) : p);
    });
}

// e^x: e^(x - n ln 2) as a polynomial (degree 6, within 2 units in the last place; Cephes' expf) times 2^n.
inline Vector<float> exponential(Vector<float> x) {
    typedef int32_t Whole __attribute__((vector_size(VECTOR_BYTES)));
    const Vector<float> zero = {};
    const Vector<float> low = zero - 87.0f, high = zero + 88.0f, shifter = zero + 12582912.0f;  // 1.5 * 2^23, which rounds what it meets
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vector<float> n = (x * 1.44269504f + shifter) - shifter;
    const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Whole power = (__builtin_convertvector(n, Whole) + 127) << 23;
    Vector<float> scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

inline Vector<double> exponential(Vector<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

template <class T> inline Vector<T> activated(Vector<T> x, int64_t activation) {
    const Vector<T> zero = {};
    switch (activation) {
        case SILU: return x / (exponential(-x) + T(1));
        case GELU_TANH:  // tanh v = 1 - 2 / (e^(2 v) + 1)
            return x - x / (exponential((x + x * x * x * T(0.044715)) * T(1.5957691216057308)) + T(1));
        case RELU: return x < zero ? zero : x;
        default:
            for (int i = 0; i < LANES<T>; ++i) x[i] = T(0.5) * x[i] * (T(1) + std::erf(x[i] * T(0.7071067811865476)));
            return x;
    }
}

// to[i] = f(a[i], b[i]), a vector at a time, the last one padded with zeros.
template <class T, class F> inline void each_vector(T *to, const T *a, const T *b, int64_t size, F f) {
    int64_t i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) store<T>(to + i, f(load(a + i), load(b + i)));
    if (i < size) {
        T pa[LANES<T>] = {}, pb[LANES<T>] = {};
        std::memcpy(pa, a + i, (size - i) * sizeof(T));
        std::memcpy(pb, b + i, (size - i) * sizeof(T));
        store<T>(pa, f(load(pa), load(pb)));
        std::memcpy(to + i, pa, (size - i) * sizeof(T));
    }
}

// scores[0 .. size) become e^(score - largest), lanes behind them 0, up to a whole vector; returns their sum. There has to be room.
template <class T> T exponentials(T *scores, int64_t size) {
    for (int64_t i = size; i % LANES<T>; ++i) scores[i] = scores[0];
    Vector<T> most = load(scores), total[1] = {};
    for (int64_t i = LANES<T>; i < size; i += LANES<T>) {
        const Vector<T> others = load(scores + i);
        most = others > most ? others : most;
    }
    T largest = most[0];
    for (int lane = 1; lane < LANES<T>; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    for (int64_t i = 0; i < size; i += LANES<T>) {
        Vector<T> weights = exponential(load(scores + i) - largest);
        for (int64_t lane = size - i; lane < LANES<T>; ++lane) weights[lane] = 0;
        total[0] += weights;
        store<T>(scores + i, weights);
    }
    return sums<T, 1>(total)[0];
}

template <class T> Real<T> mean_square(const T *x, int64_t size) {
    Real<T> sum = 0;
    block_product<T, 1, 1>(x, 0, x, 0, size, x, 0, [&](int, int, Real<T> p) { sum = p; });
    return sum / size;
}

template <class T> void norm(const T *kept, T *out, const T *weight, const T *bias, int64_t size, double epsilon, bool is_layer_norm) {
    typedef Real<T> R;
    static thread_local std::vector<R> memory;
    memory.resize(size);
    R *x = memory.data(), mean = 0;
    for (int64_t i = 0; i < size; ++i) x[i] = kept[i];
    if (is_layer_norm) {
        for (int64_t i = 0; i < size; ++i) mean += x[i];
        mean /= size;
        for (int64_t i = 0; i < size; ++i) x[i] -= mean;
    }
    const R factor = 1 / std::sqrt(mean_square(x, size) + R(epsilon));
    for (int64_t i = 0; i < size; ++i) out[i] = T(x[i] * factor * R(weight[i]) + (bias ? R(bias[i]) : R(0)));
}
