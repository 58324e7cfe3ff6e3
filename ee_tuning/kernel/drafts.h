// A round of speculation of a lone sequence: tokens that an exit drafts one after the other until it is not sure enough, and their check.
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

struct Route {  // of the network, around the exit
    const Layer *layers;
    int64_t num_layers;
    const Layer *own;  // the head's own, or null
    const Head *head;
    int64_t takes_mlp_input;  // whether the head takes what an `mlp` exit does
    const Layer *rest;
    int64_t num_rest;
    const Head *final_head;
};

struct Round {
    // in
    int64_t token, position, most, num_threads;  // the newest token, which is asked first, and how many may be asked
    int64_t num_waiting;                         // tokens right before it that lack keys and values in the head's own layer
    double sure;                                 // what the first one has to be
    const int64_t *places;
    const void *cos, *sin, *embedding, *waiting;  // embedding [v, h], waiting [num_waiting, h]
    // out
    int64_t num_asked, num_drafted;  // the last one asked may not have been sure enough
    double seconds_in_heads;
    double *said, *checked;  // [most, 2] of the exit, [num_drafted + 1, 2] of the final head: likeliest token, probability
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

// The newest token and its drafts up to the exit, asked there as long as the rule has it: their states.
template <class T> void draft(const Shape &s, const Route &route, const DraftRule &rule, Round &round, T *states) {
    const int64_t h = s.hidden, w = round.num_waiting + 1;
    T *normed = scratch<T, DRAFTS>(2 * h + 4 * w * h), *residual = normed + h, *passed = residual + h;
    T *own_out = passed + w * h, *rest = own_out + w * h;
    Real<T> *logits = scratch<Real<T>, LOGITS>(route.head->num_rows);
    double sure = round.sure, odds = 1;
    int64_t token = round.token;
    bool is_asked = round.most > 0;
    for (int64_t i = 0;; ++i) {
        const int64_t position = round.position + i;
        const Row row{position, 1, round.places};
        T *state = states + i * h;
        run_layers(s, route.layers, route.num_layers, Pass{1, 1, round.num_threads, &row, round.cos, round.sin},
                   of<T>(round.embedding) + token * h, state, normed, residual);
        if (!is_asked) return;
        const double began = omp_get_wtime();
        const T *asked = route.takes_mlp_input ? normed : state;
        if (route.own) {
            const int64_t before = i ? 0 : round.num_waiting, count = before + 1;
            const Row owned{position - before, count, round.places};
            if (before) std::memcpy(passed, round.waiting, before * h * sizeof(T));
            std::memcpy(passed + before * h, state, h * sizeof(T));
            run_layers(s, route.own, 1, Pass{count, 1, round.num_threads, &owned, round.cos, round.sin}, passed, own_out, rest,
                       rest + w * h);
            asked = own_out + before * h;
        }
        double *top = round.said + 2 * round.num_asked++;
        run_head(s, *route.head, 1, round.num_threads, asked, residual, logits, top);
        round.seconds_in_heads += omp_get_wtime() - began;
        if (!(top[1] >= sure)) return;
        ++round.num_drafted;
        token = int64_t(top[0]);
        odds *= rule.odds[bin_of(rule, top[1])];
        sure = next_threshold(rule, odds);
        const bool ends = std::find(rule.ends, rule.ends + rule.num_ends, token) != rule.ends + rule.num_ends;
        is_asked = sure < INFINITY && round.num_drafted < round.most && !ends;
    }
}

// states [most + 1, h] are left with those behind the exit.
template <class T> void run_round(const Shape &s, const Route &route, const DraftRule &rule, Round &round, T *states) {
    round.num_asked = round.num_drafted = 0, round.seconds_in_heads = 0;
    draft(s, route, rule, round, states);
    const int64_t t = round.num_drafted + 1, h = s.hidden;
    T *hidden = scratch<T, CHECK>(t * 3 * h), *normed = hidden + t * h, *residual = normed + t * h;
    const Row row{round.position, t, round.places};
    run_layers(s, route.rest, route.num_rest, Pass{t, 1, round.num_threads, &row, round.cos, round.sin}, states, hidden, normed, residual);
    const double began = omp_get_wtime();
    run_head(s, *route.final_head, t, round.num_threads, hidden, NONE<T>,
             scratch<Real<T>, LOGITS>(t * route.final_head->num_rows), round.checked);
    round.seconds_in_heads += omp_get_wtime() - began;
}
