// Heads: from states to logits, and to the likeliest token and its probability.
//
// t tokens · h hidden · f inner width · v vocabulary
#pragma once

#include "layers.h"

struct Head {  // W Norm(x), or with an MLP W Norm(residual + MLP(x))
    const void *norm, *norm_bias, *output;
    MLP mlp;                    // fc1 is null where the head has none
    int64_t num_ids, num_rows;  // rows of W without padding, and with the padding that follows them
    const int64_t *token_ids;   // vocabulary id of each row of W; the last row is "any other token"; null without a shortlist
};
const double UNSURE = -1;  // confidence where "any other token" is likeliest; it is below every threshold

// Computes a head's logits [t, v], padding included, and the likeliest id and its probability [t, 2], without the padding.
template <class T>
void run_head(const Shape &s, const Head &head, int64_t t, int64_t num_threads, const T *x, const T *residual, Real<T> *logits,
              double *top) {
    const int64_t h = s.hidden;
    T *summed = scratch<T, HEAD>(t * 2 * h), *normed = summed + t * h;
    Real<T> *inner = scratch<Real<T>, RAISED>(t * 3 * head.mlp.inner);
    Meeting meeting;
#pragma omp parallel num_threads(int(num_threads))
    {
        const T *states = x;
        if (head.mlp.fc1) {
            mlp(s, meeting, head.mlp, t, x, residual, summed, inner + t * head.mlp.inner, inner);
            states = summed;
        }
        if (head.norm) {
            norms(s, meeting, t, states, head.norm, head.norm_bias, normed);
            states = normed;
        }
        linear<T>(states, t, h, of<T>(head.output), NONE<T>, NONE<T>, logits, head.num_rows, Share(head.num_rows));
        meeting.wait();
        static thread_local std::vector<Real<T>> weights;
        weights.resize(head.num_ids + LANES<T>);
#pragma omp for nowait
        for (int64_t k = 0; k < t; ++k) {
            const Real<T> *own = logits + k * head.num_rows;
            std::copy(own, own + head.num_ids, weights.begin());
            const int64_t said = head.num_ids - (head.token_ids != nullptr), best = std::max_element(own, own + said) - own;
            top[2 * k] = double(head.token_ids ? head.token_ids[best] : best);
            const Real<T> total = exponentials(weights.data(), head.num_ids);  // in the type of the logits, as they are
            top[2 * k + 1] = said < head.num_ids && own[said] > own[best] ? UNSURE : 1 / total;
        }
    }
}
