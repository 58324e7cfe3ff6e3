"""The learning rate of a step."""
import math

from ee_tuning.config import TuningSection


def learning_rate(step: int, tuning: TuningSection) -> float:
    """Of the 1-based optimizer step: a linear rise from 0 over the warm-up, then the decay, which meets min_lr at the last step."""
    num_warmup = int(tuning.lr_warmup_fraction * tuning.train_iters)
    if step <= num_warmup:
        return tuning.lr * step / num_warmup
    if tuning.lr_decay_style == "constant":
        return tuning.lr
    progress = min((step - num_warmup) / (tuning.train_iters - num_warmup), 1.0) if tuning.train_iters > num_warmup else 1.0
    share = 1 - progress if tuning.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return tuning.min_lr + (tuning.lr - tuning.min_lr) * share
