// What Python calls (calls.py), for the NUMBER that a build is asked for: float, double, BFloat16.
#include "step.h"

extern "C" {

void run_layers(const Shape *s, const Layer *layers, int64_t num_layers, const Pass *pass, const NUMBER *states, NUMBER *hidden,
                NUMBER *normed, NUMBER *residual) {
    run_layers(*s, layers, num_layers, *pass, states, hidden, normed, residual);
}

void run_head(const Shape *s, const Head *head, int64_t t, int64_t num_threads, const NUMBER *x, const NUMBER *residual,
              Real<NUMBER> *logits, double *top) {
    run_head(*s, *head, t, num_threads, x, residual, logits, top);
}

void run_step(const Shape *s, Step *step) {
    run_step<NUMBER>(*s, *step);
}
}
