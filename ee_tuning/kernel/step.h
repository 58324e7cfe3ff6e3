// A stage's part of a decoding step: new tokens through its segments, each row until a head is sure enough, with the
// tokens of the rows that are still pending deeper. model_runner.py has the same loop by torch's operators.
//
// t tokens · h hidden · r rows, one for each sequence
#pragma once

#include "heads.h"

struct Segment {
    const Layer *layers;  // in the one array of the stage's layers, so that neighbouring segments can run as one
    int64_t num_layers;
    const Layer *own;         // the head's own layer; null where it has none
    const Head *head;         // the head behind the segment; null where there is none
    int64_t takes_mlp_input;  // whether the head takes the last layer's MLP input and residual, as an `mlp` exit does
    int64_t is_read;          // whether a drafting head reads the segment's output, from the ring behind it
};

struct StepRow {
    // in
    const int64_t *places;     // places of the sequence's tokens in every layer's cache, beginning with its first token
    int64_t *num_computed;     // [segments] tokens that have keys and values in the segment; in and out
    int64_t *num_own;          // [segments] the same in the head's own layer; -1 where the row never asks that head; in and out
    const double *thresholds;  // [segments] least confidence at which the newest token leaves; infinite where no head is asked
    const int64_t *tokens;     // ids of the newest num_new tokens; the first stage embeds them
    int64_t num_new, num_arrived;  // new tokens; tokens that have arrived at the first segment, the new ones included
    int64_t slot;                  // the row's slot in the boundary rings
    int64_t last_segment, num_asked;  // the head behind last_segment is asked about the newest num_asked tokens
    int64_t is_active, rides;         // whether the row may leave; whether its pending tokens go as deep as other rows do
    int64_t most_drafts;              // how often the row may go on with a token that an exit drafted
    const int64_t *ends;              // [num_ends] tokens after which nothing is drafted
    int64_t num_ends;
    // out
    int64_t segment;           // segment behind which the row left; -1 where it did not leave
    int64_t num_exit_answers;  // answers of exits before last_segment; 0 where exit_answers is null
    double *exit_answers;      // [num_exit_answers, 3] segment, token and probability of each answer, or null
    double *top;               // [num_asked + most_drafts, 2] likeliest token and its probability, by the head where the row left
    void *logits;              // [num_asked, v] logits of the same head, or null
    int64_t num_drafted;
};

struct Step {
    int64_t num_threads, num_rows, num_segments;
    int64_t first;    // the segment that the step begins with
    int64_t is_fill;  // whether pending tokens go through all segments, wherever rows leave
    int64_t reads;    // whether a drafting head reads any row
    StepRow *rows;
    const Segment *segments;
    void *const *rings;  // [segments + 1] rings [slots, capacity, h] of states before each segment and after the last; null at the model's end
    int64_t capacity;
    const void *cos, *sin, *embedding;  // embedding [v, h]; null where the states of new tokens come from the ring
    // out
    double seconds_in_heads;
};

// The loop over a step's segments. `active` holds the rows that have not left yet, `members` the rows of the current pass.
template <class T> class StepLoop {
    const Shape &s;
    Step &step;
    std::vector<int64_t> active, members;
    std::vector<Row> pass;  // the tokens of each member, in the order of `members`
    T *joined, *hidden, *normed, *residual;

    StepRow &row(int64_t r) { return step.rows[r]; }
    int64_t arrived(const StepRow &row, int64_t segment) {
        return segment == step.first ? row.num_arrived : row.num_computed[segment - 1];
    }
    T *state(int64_t boundary, const StepRow &row, int64_t position) {
        T *ring = static_cast<T *>(step.rings[boundary]);
        return ring + (row.slot * step.capacity + position % step.capacity) * s.hidden;
    }
    bool is_asked(const StepRow &row, int64_t segment) {
        return segment == row.last_segment ? row.num_asked > 0 : row.thresholds[segment] < INFINITY;
    }
    bool goes_through(int64_t r, int64_t segment, bool is_active) {
        const StepRow &each = row(r);
        return (is_active || each.rides) && segment <= each.last_segment && arrived(each, segment) > each.num_computed[segment];
    }

    void find_members(int64_t segment) {
        members.clear(), pass.clear();
        for (int64_t r = 0, a = 0; r < step.num_rows; ++r) {
            const bool is_active = a < int64_t(active.size()) && active[a] == r;
            a += is_active;
            if (!goes_through(r, segment, is_active)) continue;
            const StepRow &each = row(r);
            members.push_back(r);
            pass.push_back(Row{each.num_computed[segment], arrived(each, segment) - each.num_computed[segment], each.places});
        }
    }

    // Returns the last segment that one pass can run together with this one: up to it no head is asked or has its own layer, no
    // row ends, no drafting head reads, and no token is pending.
    int64_t run_end(int64_t segment) {
        for (; segment + 1 < step.num_segments; ++segment) {
            if (step.reads && step.segments[segment].is_read) return segment;
            for (const int64_t r : active)
                if (is_asked(row(r), segment)) return segment;
            for (const int64_t r : members)
                if (segment == row(r).last_segment || row(r).num_own[segment] >= 0) return segment;
            for (int64_t r = 0; r < step.num_rows; ++r)
                if (row(r).num_computed[segment] > row(r).num_computed[segment + 1] && segment < row(r).last_segment) return segment;
        }
        return segment;
    }

    void gather(int64_t segment) {
        const int64_t h = s.hidden;
        T *to = joined;
        for (size_t m = 0; m < members.size(); ++m) {
            const StepRow &each = row(members[m]);
            for (int64_t i = 0; i < pass[m].length; ++i, to += h) {
                const int64_t position = pass[m].start + i, fresh = position - (each.num_arrived - each.num_new);
                const T *from = step.embedding && segment == step.first ? of<T>(step.embedding) + each.tokens[fresh] * h
                                                                         : state(segment, each, position);
                std::memcpy(to, from, h * sizeof(T));
            }
        }
    }

    // Writes a segment's output to the ring, for rows that go deeper, now or later, and for rows whose head has its own layer.
    void keep(int64_t segment) {
        const T *from = hidden;
        for (size_t m = 0; m < members.size(); ++m) {
            const StepRow &each = row(members[m]);
            const bool is_kept = segment < each.last_segment || each.num_own[segment] >= 0;
            for (int64_t i = 0; i < pass[m].length; ++i, from += s.hidden)
                if (is_kept) std::memcpy(state(segment + 1, each, pass[m].start + i), from, s.hidden * sizeof(T));
        }
    }

    void run(int64_t first, int64_t last) {
        int64_t num_layers = 0, t = 0;
        for (int64_t i = first; i <= last; ++i) num_layers += step.segments[i].num_layers;
        for (const Row &each : pass) t += each.length;
        if (num_layers)
            run_layers(s, step.segments[first].layers, num_layers, Pass{t, int64_t(pass.size()), step.num_threads, pass.data(), step.cos, step.sin},
                       joined, hidden, normed, residual);
        else std::memcpy(hidden, joined, t * s.hidden * sizeof(T));
        for (size_t m = 0; m < members.size(); ++m)
            for (int64_t i = first; i <= last; ++i) row(members[m]).num_computed[i] = pass[m].start + pass[m].length;
    }

    // Runs the head's own layer over all tokens of the asked rows that it has not computed yet, and writes its output for each
    // row's newest token to `to` [asked rows, h]. Returns the number of these states.
    int64_t own_states(const Segment &segment, int64_t number, const std::vector<int64_t> &asked, T *to) {
        const int64_t h = s.hidden;
        std::vector<Row> rows;
        int64_t t = 0;
        for (const int64_t r : asked) {
            const int64_t start = row(r).num_own[number], length = row(r).num_computed[number] - start;
            rows.push_back(Row{start, length, row(r).places});
            t += length;
        }
        T *in = scratch<T, OWN>(4 * t * h), *out = in + t * h, *rest = out + t * h, *at = in;
        for (size_t q = 0; q < asked.size(); ++q)
            for (int64_t i = 0; i < rows[q].length; ++i, at += h)
                std::memcpy(at, state(number + 1, row(asked[q]), rows[q].start + i), h * sizeof(T));
        run_layers(s, segment.own, 1, Pass{t, int64_t(rows.size()), step.num_threads, rows.data(), step.cos, step.sin}, in, out, rest,
                   rest + t * h);
        at = out;
        for (size_t q = 0; q < asked.size(); ++q) {
            at += rows[q].length * h;
            std::memcpy(to + q * h, at - h, h * sizeof(T));
            row(asked[q]).num_own[number] += rows[q].length;
        }
        return int64_t(asked.size());
    }

    int64_t passed_states(const Segment &segment, int64_t number, const std::vector<int64_t> &asked, T *to, T *added) {
        const int64_t h = s.hidden;
        const T *states = segment.takes_mlp_input ? normed : hidden;
        int64_t q = 0, end = 0;
        size_t m = 0;
        for (const int64_t r : asked) {
            for (; members[m] != r; ++m) end += pass[m].length;
            const int64_t count = num_states(row(r), number), first = end + pass[m].length - count;
            std::memcpy(to + q * h, states + first * h, count * h * sizeof(T));
            std::memcpy(added + q * h, residual + first * h, count * h * sizeof(T));
            q += count;
        }
        return q;
    }
    int64_t num_states(const StepRow &each, int64_t number) {
        return number == each.last_segment ? each.num_asked + each.num_drafted : 1;
    }

    void ask(int64_t number) {
        const Segment &segment = step.segments[number];
        std::vector<int64_t> asked, stay;
        int64_t count = 0;
        for (const int64_t r : active)
            if (segment.head && is_asked(row(r), number)) asked.push_back(r), count += num_states(row(r), number);
        const double began = omp_get_wtime();
        T *states = scratch<T, ASKED>(count * 2 * s.hidden), *added = states + count * s.hidden;
        Real<T> *logits = count ? scratch<Real<T>, LOGITS>(count * segment.head->num_rows) : nullptr;
        std::vector<double> top(2 * count);
        if (count) {
            if (segment.own) own_states(segment, number, asked, states);
            else passed_states(segment, number, asked, states, added);
            run_head(s, *segment.head, count, step.num_threads, states, added, logits, top.data());
            step.seconds_in_heads += omp_get_wtime() - began;
        }
        int64_t q = 0;
        size_t a = 0;
        for (const int64_t r : active) {
            StepRow &each = row(r);
            const bool ends = number == each.last_segment;
            if (a == asked.size() || asked[a] != r) {
                if (!ends) stay.push_back(r);
                continue;
            }
            ++a;
            const int64_t own = num_states(each, number);
            const double *answer = &top[2 * q];
            if (!ends && each.exit_answers) {
                double *to = each.exit_answers + 3 * each.num_exit_answers++;
                to[0] = double(number), to[1] = answer[0], to[2] = answer[1];
            }
            if (ends || answer[1] >= each.thresholds[number]) {
                each.segment = number;
                std::copy(answer, answer + 2 * own, each.top);
                if (each.logits)
                    std::memcpy(each.logits, logits + q * segment.head->num_rows, own * segment.head->num_rows * sizeof(Real<T>));
            } else stay.push_back(r);
            q += own;
        }
        active = stay;
    }

  public:
    StepLoop(const Shape &s, Step &step) : s(s), step(step) {
        int64_t most = 0;
        for (int64_t r = 0; r < step.num_rows; ++r) most += row(r).num_arrived - row(r).num_computed[step.num_segments - 1] + row(r).most_drafts;
        most = std::max<int64_t>(most, 1);
        joined = scratch<T, STEP>(4 * most * s.hidden), hidden = joined + most * s.hidden;
        normed = hidden + most * s.hidden, residual = normed + most * s.hidden;
        step.seconds_in_heads = 0;
    }

    void go() {
        active.clear();
        for (int64_t r = 0; r < step.num_rows; ++r) {
            row(r).segment = -1;
            if (row(r).is_active) active.push_back(r);
        }
        for (int64_t first = step.first; first < step.num_segments && (step.is_fill || !active.empty());) {
            find_members(first);
            const int64_t last = run_end(first);
            if (!members.empty()) {
                gather(first);
                run(first, last);
                keep(last);
            }
            ask(last);
            first = last + 1;
        }
    }

    // Makes the token that a row's exit drafted the row's newest token. Returns false where there is no draft, or no more are allowed.
    bool feeds_draft(StepRow &each, int64_t *token) {
        if (each.segment < 0 || each.segment == each.last_segment || each.num_drafted == each.most_drafts) return false;
        *token = int64_t(each.top[0]);
        each.tokens = token, each.num_new = 1, ++each.num_arrived;
        const bool is_end = std::find(each.ends, each.ends + each.num_ends, *token) != each.ends + each.num_ends;
        if (++each.num_drafted == each.most_drafts || is_end) each.thresholds = never.data();
        return true;
    }
    std::vector<double> never;
};

// Runs one step. A row that is alone goes on with the tokens that an exit drafts for it, until the final head checks them.
template <class T> void run_step(const Shape &s, Step &step) {
    StepLoop<T> loop(s, step);
    loop.never.assign(step.num_segments, INFINITY);
    int64_t token;
    do loop.go();
    while (step.num_rows == 1 && loop.feeds_draft(step.rows[0], &token));
}
