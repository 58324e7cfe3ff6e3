// Tokens that an exit drafts one after the other, until it is not sure enough: nothing is decided elsewhere in between.
//
// h hidden · v vocabulary
#pragma once

#include "heads.h"

struct DraftRule {  // as Speculation.threshold decides
    double wanted;       // a draft has to be so sure,
    double worth;        // and all drafts together so likely right
    const double *edges, *odds;  // how likely a draft of so much confidence is right: lower edges of bins, and each bin's odds
    int64_t num_bins;
    const int64_t *ends;  // tokens behind which nothing is drafted
    int64_t num_ends;
};

struct Drafts {
    // in
    int64_t token, position, most, num_threads;  // the newest token, which is asked first, and how many may be asked
    int64_t num_waiting;                         // tokens right before it that lack keys and values in the head's own layer
    int64_t takes_mlp_input;                     // whether the head takes what an `mlp` exit does
    double sure, odds;                           // what the first one has to be; of the drafts before it
    const int64_t *places;
    const void *cos, *sin, *embedding, *waiting;  // embedding [v, h], waiting [num_waiting, h]
    // out
    int64_t num_asked, num_drafted;  // the last one asked may not have been sure enough
    double seconds_in_head;
    int64_t *tokens;    // [most]
    double *confidence;  // [most]
};

// The bin that a confidence lies in.
inline int64_t bin_of(const DraftRule &rule, double confidence) {
    int64_t bin = 0;
    while (bin + 1 < rule.num_bins && confidence >= rule.edges[bin + 1]) ++bin;
    return bin;
}

// How sure the next draft has to be, behind drafts of these odds; none is where it is infinite.
inline double next_threshold(const DraftRule &rule, double odds) {
    for (int64_t bin = 0; bin < rule.num_bins; ++bin)
        if (odds >= rule.worth && odds * rule.odds[bin] >= rule.worth) return std::max(rule.wanted, rule.edges[bin]);
    return INFINITY;
}

// states [most, h] are left with what goes on into the next layers.
template <class T>
void run_drafts(const Shape &s, const Layer *layers, int64_t num_layers, const Layer *own, const Head &head, const DraftRule &rule,
                Drafts &d, T *states) {
    const int64_t h = s.hidden, w = d.num_waiting + 1;
    T *normed = scratch<T, DRAFTS>(2 * h + 4 * w * h + head.num_rows), *residual = normed + h, *passed = residual + h;
    T *own_out = passed + w * h, *rest = own_out + w * h, *logits = rest + 2 * w * h;
    double sure = d.sure, odds = d.odds, top[2];
    int64_t token = d.token;
    d.num_asked = d.num_drafted = 0, d.seconds_in_head = 0;
    while (d.num_asked < d.most) {
        const int64_t i = d.num_asked++, position = d.position + i;
        const Row row{position, 1, d.places};
        const Pass pass{1, 1, d.num_threads, &row, d.cos, d.sin};
        T *state = states + i * h;
        run_layers(s, layers, num_layers, pass, of<T>(d.embedding) + token * h, state, normed, residual);
        const double began = omp_get_wtime();
        const T *asked = d.takes_mlp_input ? normed : state;
        if (own) {
            const int64_t before = i ? 0 : d.num_waiting, count = before + 1;
            const Row owned{position - before, count, d.places};
            std::memcpy(passed, d.waiting, before * h * sizeof(T));
            std::memcpy(passed + before * h, state, h * sizeof(T));
            run_layers(s, own, 1, Pass{count, 1, d.num_threads, &owned, d.cos, d.sin}, passed, own_out, rest, rest + w * h);
            asked = own_out + before * h;
        }
        run_head(s, head, 1, d.num_threads, asked, residual, logits, top);
        d.seconds_in_head += omp_get_wtime() - began;
        d.tokens[i] = token = int64_t(top[0]);
        d.confidence[i] = top[1];
        if (!(top[1] >= sure)) return;
        ++d.num_drafted;
        odds *= rule.odds[bin_of(rule, top[1])];
        sure = next_threshold(rule, odds);
        if (sure == INFINITY || std::find(rule.ends, rule.ends + rule.num_ends, token) != rule.ends + rule.num_ends) return;
    }
}
