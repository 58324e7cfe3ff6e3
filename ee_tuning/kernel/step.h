// A step of a lone sequence: its newest token through the segments of the network, until a head is sure enough.
//
// t tokens · h hidden
#pragma once

#include "heads.h"

struct Segment {
    const Layer *layers;
    int64_t num_layers;
    const Head *head;         // behind it
    int64_t takes_mlp_input;  // whether the head takes what an `mlp` exit does
    double threshold;         // where the token leaves; behind the last segment it always does
    const void *waiting;      // [num_waiting, h], states at the entrance, of the tokens right before
    int64_t num_waiting;
};

struct Step {
    // in
    int64_t token, position, num_threads;
    const int64_t *places;
    const void *cos, *sin, *embedding;  // embedding [v, h]
    // out
    int64_t segment, num_carried;  // where the token left, and how many tokens' states have to wait behind it
    double seconds_in_heads;
    double top[2];  // the likeliest token and its probability
};

// carried [most, h] takes the states that have to wait, and there may never be more on the way.
template <class T>
void run_step(const Shape &s, const Segment *segments, int64_t num_segments, Step &step, int64_t most, T *carried) {
    const int64_t h = s.hidden;
    T *joined = scratch<T, STEP>(3 * most * h + segments[num_segments - 1].head->num_rows), *normed = joined + most * h;
    T *residual = normed + most * h;
    const T *entering = of<T>(step.embedding) + step.token * h;
    int64_t t = 1;
    step.seconds_in_heads = 0;
    for (step.segment = 0;; ++step.segment) {
        const Segment &segment = segments[step.segment];
        if (segment.num_waiting) {
            std::memmove(joined + segment.num_waiting * h, entering, t * h * sizeof(T));
            std::memcpy(joined, segment.waiting, segment.num_waiting * h * sizeof(T));
            t += segment.num_waiting;
            entering = joined;
        }
        const Row row{step.position + 1 - t, t, step.places};
        run_layers(s, segment.layers, segment.num_layers, Pass{t, 1, step.num_threads, &row, step.cos, step.sin}, entering, carried, normed,
                   residual);
        const double began = omp_get_wtime();
        const T *asked = (segment.takes_mlp_input ? normed : carried) + (t - 1) * h;
        run_head(s, *segment.head, 1, step.num_threads, asked, residual + (t - 1) * h, residual + most * h, step.top);
        step.seconds_in_heads += omp_get_wtime() - began;
        if (step.segment + 1 == num_segments || step.top[1] >= segment.threshold) break;
        entering = carried;
    }
    step.num_carried = t;
}
