"""What the tuner asks of its settings, beyond their types."""
from ee_tuning.config import TuningSection
from ee_tuning.errors import InputError


def check_settings(tuning: TuningSection) -> None:
    """Raises InputError on a value out of range. Batch sizes are the loader's to check, loss weights those of `loss_weights`."""
    for name, least in (("train_iters", 1), ("log_interval", 1), ("loss_chunk_tokens", 1), ("keep_checkpoints", 1), ("eval_interval", 0),
                        ("save_interval", 0), ("clip_grad", 0), ("weight_decay", 0), ("min_lr", 0)):
        value = getattr(tuning, name)
        if value < least:
            raise InputError(f"tuning.{name} must be at least {least}, got {value}")
    for name in ("lr", "adam_eps"):
        value = getattr(tuning, name)
        if not 0 < value < float("inf"):
            raise InputError(f"tuning.{name} must be above 0 and finite, got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(tuning, name)
        if not 0 <= value < 1:
            raise InputError(f"tuning.{name} must be at least 0 and below 1, got {value}")
    if not 0 <= tuning.lr_warmup_fraction <= 1:
        raise InputError(f"tuning.lr_warmup_fraction must lie in 0..1, got {tuning.lr_warmup_fraction}")
    if tuning.min_lr > tuning.lr:
        raise InputError(f"tuning.min_lr must be at most tuning.lr = {tuning.lr}, got {tuning.min_lr}; lower it or raise tuning.lr")


def loss_weights(tuning: TuningSection, exit_layers: tuple[int, ...]) -> dict[int, float]:
    """The weight of each exit's loss, 1 where none are given. Raises InputError where they do not fit the exits."""
    _check_loss_weights(tuning.loss_weights, exit_layers)
    return dict(zip(exit_layers, tuning.loss_weights or [1.0] * len(exit_layers), strict=True))


def _check_loss_weights(weights: tuple[float, ...], exit_layers: tuple[int, ...]) -> None:
    if not weights:
        return
    if len(weights) != len(exit_layers):
        raise InputError(f"tuning.loss_weights must give one weight per exit, {len(exit_layers)} for the exits "
                         f"{','.join(map(str, exit_layers))}, got {len(weights)}")
    wrong = [weight for weight in weights if not 0 <= weight < float("inf")]
    if wrong:
        raise InputError(f"tuning.loss_weights must be at least 0 and finite, got {wrong[0]}; 0 freezes an exit")
    if not any(weights):
        raise InputError("tuning.loss_weights must leave an exit to train, got 0 for each; give one of them a weight above 0")
