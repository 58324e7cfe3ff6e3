// A run of transformer layers over the few tokens of a decoding step.
//
// A step moves so few numbers that going from operator to operator costs more than the arithmetic. Here a run of layers is one call: the
// threads stay together from the first norm to the last matrix, and each weight is read once for all tokens.
//
// t tokens · h hidden · g key-value heads · n/g query heads of each · d width of a head · f inner width
#pragma once

#include "attention.h"
#include "meeting.h"

struct Shape {
    int64_t hidden, groups, per_group, width, has_layer_norm, is_rotated, activation;
    double epsilon, scale;
};

struct MLP {  // W2 (σ(gate x) · up x), or W2 σ(W1 x)
    const void *fc1, *fc1_bias, *fc2, *fc2_bias;
    int64_t inner, is_gated;
};

struct Layer {  // null where the family has none
    const void *input_norm, *input_norm_bias, *qkv, *qkv_bias, *head_norm, *proj, *proj_bias, *mlp_norm, *mlp_norm_bias;
    MLP mlp;
    void *keys, *values;
};

struct Pass {
    int64_t num_tokens, num_rows, num_threads;
    const Row *rows;
    const void *cos, *sin;
};

template <class T> constexpr const T *NONE = nullptr;
template <class T> const T *of(const void *p) { return static_cast<const T *>(p); }

// Memory of this thread, one piece for each purpose, until the next call for it.
enum Purpose { LAYERS, HEAD, RAISED, STEP, OWN, ASKED, LOGITS };
template <class T, Purpose> T *scratch(int64_t size) {
    static thread_local std::vector<T> memory;
    if (int64_t(memory.size()) < size) memory.resize(size);
    return memory.data();
}

// Ends with all threads together.
template <class T>
void norms(const Shape &s, Meeting &meeting, int64_t t, const T *x, const void *weight, const void *bias, T *out) {
    for (int64_t k = omp_get_thread_num(); k < t; k += omp_get_num_threads())
        norm(x + k * s.hidden, out + k * s.hidden, of<T>(weight), of<T>(bias), s.hidden, s.epsilon, s.has_layer_norm);
    meeting.wait();
}

// out = residual + MLP(x). raised [t, f or 2 f] and inner [t, f] are for what comes between. Ends with all threads together.
template <class T> void mlp(const Shape &s, Meeting &meeting, const MLP &m, int64_t t, const T *x, const T *residual, T *out, Real<T> *raised,
                            Real<T> *inner) {
    const int64_t raised_rows = m.inner * (m.is_gated ? 2 : 1);
    const Share own(m.inner), up(own.first + m.inner, own.last + m.inner);
    linear<T>(x, t, s.hidden, of<T>(m.fc1), of<T>(m.fc1_bias), NONE<T>, raised, raised_rows, own);
    if (m.is_gated) linear<T>(x, t, s.hidden, of<T>(m.fc1), of<T>(m.fc1_bias), NONE<T>, raised, raised_rows, up);
    for (int64_t k = 0; k < t; ++k) {
        const Real<T> *gate = raised + k * raised_rows + own.first, *other = m.is_gated ? gate + m.inner : gate;
        each_vector(inner + k * m.inner + own.first, gate, other, own.last - own.first, [&](Vector<T> a, Vector<T> b) {
            return m.is_gated ? activated<Real<T>>(a, s.activation) * b : activated<Real<T>>(a, s.activation);
        });
    }
    meeting.wait();
    linear<T>(inner, t, m.inner, of<T>(m.fc2), of<T>(m.fc2_bias), residual, out, s.hidden, Share(s.hidden));
    meeting.wait();
}

// Layers over states [t, h]: hidden, and in normed and residual what the last layer's MLP took and was added to, [t, h] each.
template <class T>
void run_layers(const Shape &s, const Layer *layers, int64_t num_layers, const Pass &pass, const T *states, T *hidden, T *normed,
                T *residual) {
    const int64_t t = pass.num_tokens, h = s.hidden, attended_size = s.groups * s.per_group * s.width;
    const int64_t qkv_rows = s.groups * (s.per_group + 2) * s.width, inner_size = layers[0].mlp.inner;
    Real<T> *qkv = scratch<Real<T>, LAYERS>(t * (qkv_rows + attended_size + 3 * inner_size)), *attended = qkv + t * qkv_rows;
    Real<T> *inner = attended + t * attended_size, *raised = inner + t * inner_size;
    Meeting meeting;
    std::vector<std::atomic<int64_t>> next_tasks(num_layers);
    std::vector<int64_t> firsts(pass.num_rows);
    for (int64_t i = 0, first = 0; i < pass.num_rows; first += pass.rows[i++].length) firsts[i] = first;
#pragma omp parallel num_threads(int(pass.num_threads))
    for (int64_t number = 0; number < num_layers; ++number) {
        static thread_local RowAttention<T> attention;
        const Layer &layer = layers[number];
        const Attention<T> heads{s.groups, s.per_group, s.width, s.is_rotated, s.epsilon, s.scale, of<T>(layer.head_norm), of<T>(pass.cos),
                                 of<T>(pass.sin), static_cast<T *>(layer.keys), static_cast<T *>(layer.values)};
        const T *entering = number ? hidden : states;
        norms(s, meeting, t, entering, layer.input_norm, layer.input_norm_bias, normed);
        linear<T>(normed, t, h, of<T>(layer.qkv), of<T>(layer.qkv_bias), NONE<T>, qkv, qkv_rows, Share(qkv_rows));
        meeting.wait();
        for (int64_t task; (task = next_tasks[number].fetch_add(1)) < pass.num_rows * s.groups;) {
            const int64_t row = task / s.groups, first = firsts[row];
            attention.run(heads, pass.rows[row], task % s.groups, qkv + first * qkv_rows, attended + first * attended_size);
        }
        meeting.wait();
        linear<T>(attended, t, attended_size, of<T>(layer.proj), of<T>(layer.proj_bias), entering, residual, h, Share(h));
        meeting.wait();
        norms(s, meeting, t, residual, layer.mlp_norm, layer.mlp_norm_bias, normed);
        mlp(s, meeting, layer.mlp, t, normed, residual, hidden, raised, inner);
    }
}
