// A step of sequences that decode side by side: their newest tokens through the segments of a stage of the network, each until a head is sure
// enough.
//
// t tokens · h hidden · r sequences
#pragma once

#include "heads.h"

struct Segment {
    const Layer *layers;
    int64_t num_layers;
    const Head *head;         // behind it; null where nobody is asked
    int64_t takes_mlp_input;  // whether the head takes what an `mlp` exit does
    double threshold;         // where a token leaves; behind the network's last segment all do
};

struct Waiting {  // states at the entrance of a segment, of the tokens right before the newest one
    const void *states;
    int64_t count;
};

struct StepRow {
    // in
    int64_t token, position;
    const int64_t *places;
    int64_t num_carried;  // tokens that come in, the newest one last; out: whose states have to wait behind the last segment that ran
    int64_t segment;      // STAYS where the token wants to leave; out: where it did, or STAYS
    // out
    double top[2];  // the likeliest token and its probability
};
const int64_t STAYS = -1;

struct Step {
    int64_t num_threads, num_rows;
    int64_t first, num_segments;  // the segment to begin with; all of them
    int64_t is_fill;              // whether they run though nobody wants to leave
    StepRow *rows;
    const Waiting *waiting;             // [segments, r]
    const void *cos, *sin, *embedding;  // embedding [v, h]
    const void *entering;               // [Σ num_carried, h], or null: then one token a row comes in, and is embedded
    // out
    int64_t num_run;  // the segment behind the last one that ran
    double seconds_in_heads;
};

// Everybody's tokens in front of a segment, those that waited first: to[., h], sequence by sequence. They `came` there, or are embedded.
// Returns how many.
template <class T> int64_t join(const Step &step, int64_t number, int64_t h, const T *came, T *to) {
    int64_t total = 0;
    for (int64_t r = 0; r < step.num_rows; ++r) {
        StepRow &row = step.rows[r];
        const Waiting &waiting = step.waiting[number * step.num_rows + r];
        const T *own = came ? came : of<T>(step.embedding) + row.token * h;
        if (waiting.count) std::memcpy(to + total * h, waiting.states, waiting.count * h * sizeof(T));
        std::memcpy(to + (total + waiting.count) * h, own, row.num_carried * h * sizeof(T));
        if (came) came += row.num_carried * h;
        row.num_carried += waiting.count;
        total += row.num_carried;
    }
    return total;
}

// Asks a head about the newest tokens of those that are `going`, and lets them leave. They are the last ones of their sequence's.
template <class T>
void leave(const Shape &s, const Segment &segment, Step &step, std::vector<int64_t> &going, const T *states, const T *residual) {
    const int64_t h = s.hidden, number = step.num_run, count = int64_t(going.size());
    T *asked = scratch<T, ASKED>(count * 2 * h), *added = asked + count * h;
    Real<T> *logits = scratch<Real<T>, LOGITS>(count * segment.head->num_rows);
    std::vector<double> top(2 * count);
    int64_t last = -1, q = 0;
    for (int64_t r = 0; r < step.num_rows; ++r) {
        last += step.rows[r].num_carried;
        if (q < count && going[q] == r) {
            std::memcpy(asked + q * h, states + last * h, h * sizeof(T));
            std::memcpy(added + q++ * h, residual + last * h, h * sizeof(T));
        }
    }
    run_head(s, *segment.head, count, step.num_threads, asked, added, logits, top.data());
    std::vector<int64_t> stay;
    for (q = 0; q < count; ++q) {
        StepRow &row = step.rows[going[q]];
        row.top[0] = top[2 * q], row.top[1] = top[2 * q + 1];
        if (row.top[1] >= segment.threshold) row.segment = number;
        else stay.push_back(going[q]);
    }
    going = stay;
}

// carried [most, h] takes the states that have to wait behind the last segment that ran; there may never be more on the way. Rows that left
// before ride along.
template <class T> void run_step(const Shape &s, const Segment *segments, Step &step, int64_t most, T *carried) {
    const int64_t h = s.hidden;
    T *joined = scratch<T, STEP>(3 * most * h), *normed = joined + most * h, *residual = normed + most * h;
    std::vector<int64_t> going;
    std::vector<Row> rows(step.num_rows);
    for (int64_t r = 0; r < step.num_rows; ++r)
        if (step.rows[r].segment == STAYS) going.push_back(r);
    step.seconds_in_heads = 0;
    for (step.num_run = step.first; step.num_run < step.num_segments && (step.is_fill || !going.empty()); ++step.num_run) {
        const Segment &segment = segments[step.num_run];
        const T *came = step.num_run > step.first ? carried : of<T>(step.entering);
        const int64_t t = join(step, step.num_run, h, came, joined);
        for (int64_t r = 0; r < step.num_rows; ++r) {
            const StepRow &row = step.rows[r];
            rows[r] = Row{row.position + 1 - row.num_carried, row.num_carried, row.places};
        }
        run_layers(s, segment.layers, segment.num_layers, Pass{t, step.num_rows, step.num_threads, rows.data(), step.cos, step.sin}, joined,
                   carried, normed, residual);
        if (!segment.head || going.empty()) continue;
        const double began = omp_get_wtime();
        leave(s, segment, step, going, segment.takes_mlp_input ? normed : carried, residual);
        step.seconds_in_heads += omp_get_wtime() - began;
    }
}
