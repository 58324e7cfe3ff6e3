// Attention of one key-value head over a sequence's places in the cache, wherever they lie.
#pragma once

#include <vector>

#include "vectors.h"

// t tokens · g key-value heads · n/g query heads of each · d width of a head

template <class T> struct Attention {
    int64_t groups, per_group, width, is_rotated;
    double epsilon, scale;
    const T *head_norm;  // [n/g + 1, d], or null
    const T *cos, *sin;  // [positions, d], sin negated in its first half
    T *keys, *values;    // [places, g, d]
};

struct Row {  // a sequence's tokens of the pass
    int64_t start, length;
    const int64_t *places;  // [start + length], from the sequence's first token on
};

// f(first token, its place, count) for tokens that lie one after the other.
template <class F> inline void each_run(const int64_t *places, int64_t end, F f) {
    for (int64_t first = 0; first < end;) {
        int64_t next = first + 1;
        while (next < end && places[next] == places[next - 1] + 1) ++next;
        f(first, places[first], next - first);
        first = next;
    }
}

// One query head, or the key behind them (head n/g), normed and rotated.
template <class T, class To> void prepare(const Attention<T> &a, const Real<T> *x, int64_t head, int64_t position, To *to) {
    typedef Real<T> R;
    const int64_t d = a.width, half = d / 2;
    const T *weight = a.head_norm ? a.head_norm + head * d : nullptr, *cos = a.cos + position * d, *sin = a.sin + position * d;
    const R factor = weight ? 1 / std::sqrt(mean_square(x, d) + R(a.epsilon)) : 1;
    const auto normed = [&](int64_t i) { return weight ? x[i] * factor * R(weight[i]) : x[i]; };
    for (int64_t i = 0; i < d; ++i)
        to[i] = To(a.is_rotated ? normed(i) * R(cos[i]) + normed(i < half ? i + half : i - half) * R(sin[i]) : normed(i));
}

// Queries and what they see, of one row and key-value head. A thread keeps one, for the memory in it.
constexpr int QUERIES = 4;  // that mix values together

template <class T> class RowAttention {
    typedef Real<T> R;

  public:
    // Stores keys and values and attends. qkv [t, g, n/g + 2, d], out [t, g, n/g, d].
    void run(const Attention<T> &a, const Row &row, int64_t group, const R *qkv, R *out) {
        const int64_t d = a.width, per = a.per_group, stride = a.groups * d;
        num_queries = row.length * per, end = row.start + row.length, padded = (end + LANES<T>) / LANES<T> * LANES<T>;
        queries.resize(num_queries * d), scores.resize(num_queries * padded), totals.resize(num_queries);
        for (int64_t k = 0; k < row.length; ++k) {
            const R *heads = qkv + (k * a.groups + group) * (per + 2) * d;
            const int64_t position = row.start + k, kept = row.places[position] * stride + group * d;
            for (int64_t j = 0; j < per; ++j) prepare(a, heads + j * d, j, position, &queries[(k * per + j) * d]);
            prepare(a, heads + per * d, per, position, a.keys + kept);
            for (int64_t i = 0; i < d; ++i) a.values[kept + i] = T(heads[(per + 1) * d + i]);
        }
        each_run(row.places, end, [&](int64_t first, int64_t place, int64_t count) {
            product<T>(queries.data(), num_queries, d, a.keys + place * stride + group * d, stride, d, 0, count,
                       [&](int64_t key, int64_t q, R p) { scores[q * padded + first + key] = p * R(a.scale); });
        });
        for (int64_t q = 0; q < num_queries; ++q) {
            R *own = &scores[q * padded];
            const int64_t visible = row.start + q / per + 1;
            totals[q] = exponentials(own, visible);
            for (int64_t i = visible; i < end; ++i) own[i] = 0;
        }
        for (int64_t q = 0; q < num_queries; q += QUERIES) switch (num_queries - q) {
            case 1: mix<1>(a, row, group, q, out); break;
            case 2: mix<2>(a, row, group, q, out); break;
            case 3: mix<3>(a, row, group, q, out); break;
            default: mix<QUERIES>(a, row, group, q, out);
        }
    }

  private:
    std::vector<R> queries, scores, totals;
    int64_t num_queries, end, padded;

    // The values that Q queries from `query` on see, weighed.
    template <int Q> void mix(const Attention<T> &a, const Row &row, int64_t group, int64_t query, R *out) {
        int64_t at = 0;
        for (; at + 3 * LANES<T> <= a.width; at += 3 * LANES<T>) mix_vectors<Q, 3>(a, row, group, query, out, at);
        for (; at + LANES<T> <= a.width; at += LANES<T>) mix_vectors<Q, 1>(a, row, group, query, out, at);
        if (at < a.width) mix_part<Q>(a, row, group, query, out, at);
    }

    template <int Q, int N> void mix_vectors(const Attention<T> &a, const Row &row, int64_t group, int64_t query, R *out, int64_t at) {
        Vector<T> acc[Q][N] = {};
        const int64_t stride = a.groups * a.width;
        each_run(row.places, end, [&](int64_t first, int64_t place, int64_t count) {
            const T *values = a.values + place * stride + group * a.width + at;
            const R *weights = &scores[query * padded + first];
            for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    const Vector<T> value = load(values + j * stride + n * LANES<T>);
#pragma GCC unroll 8
                    for (int q = 0; q < Q; ++q) acc[q][n] += weights[q * padded + j] * value;
                }
            }
        });
        for (int q = 0; q < Q; ++q)
            for (int n = 0; n < N; ++n) store<R>(output(a, out, group, query + q, at + n * LANES<T>), acc[q][n] / totals[query + q]);
    }

    // The lanes behind the last whole vector.
    template <int Q> void mix_part(const Attention<T> &a, const Row &row, int64_t group, int64_t query, R *out, int64_t at) {
        const int64_t stride = a.groups * a.width, rest = a.width - at;
        Vector<T> acc[Q] = {};
        each_run(row.places, end, [&](int64_t first, int64_t place, int64_t count) {
            const T *values = a.values + place * stride + group * a.width + at;
            const R *weights = &scores[query * padded + first];
            for (int64_t j = 0; j < count; ++j)
                for (int q = 0; q < Q; ++q) acc[q] += weights[q * padded + j] * load_part(values + j * stride, rest);
        });
        for (int q = 0; q < Q; ++q) {
            const Vector<T> mixed = acc[q] / totals[query + q];
            store_part<R>(output(a, out, group, query + q, at), mixed, rest);
        }
    }

    static R *output(const Attention<T> &a, R *out, int64_t group, int64_t query, int64_t at) {
        return out + ((query / a.per_group * a.groups + group) * a.per_group + query % a.per_group) * a.width + at;
    }
};
