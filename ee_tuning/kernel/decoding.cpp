// What Python calls (calls.py), for each type of numbers.
#include "drafts.h"
#include "step.h"

#define FOR_TYPE(T)                                                                                                                    \
    extern "C" void run_layers_##T(const Shape *s, const Layer *layers, int64_t num_layers, const Pass *pass, const T *states,         \
                                   T *hidden, T *normed, T *residual) {                                                                \
        run_layers(*s, layers, num_layers, *pass, states, hidden, normed, residual);                                                   \
    }                                                                                                                                  \
    extern "C" void run_head_##T(const Shape *s, const Head *head, int64_t t, int64_t num_threads, const T *x, const T *residual,      \
                                 T *logits, double *top) {                                                                             \
        run_head(*s, *head, t, num_threads, x, residual, logits, top);                                                                 \
    }                                                                                                                                  \
    extern "C" void run_round_##T(const Shape *s, const Route *route, const DraftRule *rule, Round *round, T *states) {                \
        run_round(*s, *route, *rule, *round, states);                                                                                  \
    }                                                                                                                                  \
    extern "C" void run_step_##T(const Shape *s, const Segment *segments, Step *step, int64_t most, T *carried) {                      \
        run_step(*s, segments, *step, most, carried);                                                                                  \
    }

FOR_TYPE(float)
FOR_TYPE(double)
