"""The learning rate and the warm-up of loss weights."""

import math

from ee_tuning.config import TuningSection


def learning_rate(step: int, tuning: TuningSection) -> float:
    """Returns the learning rate of the 1-based optimizer step.

    It rises linearly from 0 during the warm-up, then decays and reaches min_lr at the last step.
    """
    num_warmup = int(tuning.lr_warmup_fraction * tuning.train_iters)
    if step <= num_warmup:
        return tuning.lr * step / num_warmup
    if tuning.lr_decay_style == "constant":
        return tuning.lr
    progress = (
        min((step - num_warmup) / (tuning.train_iters - num_warmup), 1.0) if tuning.train_iters > num_warmup else 1.0
    )
    share = 1 - progress if tuning.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return tuning.min_lr + (tuning.lr - tuning.min_lr) * share


def loss_weight_ramp(step: int, tuning: TuningSection) -> float:
    """Returns the factor of the exits' loss weights at the 1-based optimizer step: a rise from near 0 to 1, then 1."""
    num_warmup = int(tuning.loss_weight_warmup_fraction * tuning.train_iters)
    if tuning.loss_weight_style == "constant" or step >= num_warmup:
        return 1.0
    share = step / num_warmup
    return share if tuning.loss_weight_style == "linear" else 0.5 * (1 - math.cos(math.pi * share))
