"""Checks of the tuning settings beyond their types."""

import math

from ee_tuning.checkpoint.trained_names import check_tied
from ee_tuning.config import ExitsSection, TuningSection
from ee_tuning.errors import InputError
from ee_tuning.losses.objective import Objective

_TERMS = ("cross_entropy", "forward_kl", "total_variation", "lk")


def check_settings(tuning: TuningSection) -> None:
    """Raises InputError on a value out of range. The loader checks batch sizes, and `loss_weights` checks loss
    weights.
    """
    for name, least in (
        ("train_iters", 1),
        ("log_interval", 1),
        ("loss_chunk_tokens", 1),
        ("forward_chunk_length", 0),
        ("keep_checkpoints", 1),
        ("eval_interval", 0),
        ("save_interval", 0),
        ("clip_grad", 0),
        ("min_lr", 0),
        ("skip_grad_norm", 0),
        ("save_minutes", 0),
        ("teacher_top_k", 1),
        ("fit_tokens", 0),
        ("ttt_steps", 1),
        ("lora_rank", 1),
        ("half_steps", 0),
        ("final_loss_weight", 0),
    ):
        value = getattr(tuning, name)
        if value < least:
            raise InputError(f"tuning.{name} must be at least {least}, got {value}")
    # Beyond these limits, float32 holds zero or infinity for the value or for an update by it, and NaN follows.
    for name, low, high in (("lr", 1e-30, 1000), ("adam_eps", 1e-30, 1), ("weight_decay", 0, 1000)):
        value = getattr(tuning, name)
        if not low <= value <= high:
            raise InputError(f"tuning.{name} must be in {low:g}..{high:g}, got {value:g}")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(tuning, name)
        if not 0 <= value < 1:
            raise InputError(f"tuning.{name} must be at least 0 and below 1, got {value}")
    for name in ("lr_warmup_fraction", "loss_weight_warmup_fraction", "ttt_step_loss_decay"):
        value = getattr(tuning, name)
        if not 0 <= value <= 1:
            raise InputError(f"tuning.{name} must lie in 0..1, got {value}")
    if tuning.min_lr > tuning.lr:
        raise InputError(
            f"tuning.min_lr must be at most tuning.lr = {tuning.lr}, got {tuning.min_lr}; lower it or raise tuning.lr"
        )
    if not 0 <= tuning.stop_exit_code <= 255:
        raise InputError(f"tuning.stop_exit_code must be in 0..255, as of any process, got {tuning.stop_exit_code}")
    objective(tuning)  # checked here, before the run has a folder
    _check_trainable(tuning)


def _check_trainable(tuning: TuningSection) -> None:
    trained = tuning.trained
    final_objective(tuning)
    _ = tuning.depths
    if not 0 <= tuning.layer_dropout <= 1:
        raise InputError(f"tuning.layer_dropout must lie in 0..1, got {tuning.layer_dropout:g}")
    if tuning.layer_dropout and not trained.has_backbone:
        raise InputError(
            f"tuning.layer_dropout = {tuning.layer_dropout:g} is for layers that are trained, and tuning.trainable is "
            "heads; leave it out, or train lora, mlp, last:K, half, backbone or all"
        )
    if not trained.has_backbone and (tuning.teacher_model or tuning.final_loss):
        raise InputError(
            f"tuning.{'teacher_model' if tuning.teacher_model else 'final_loss'} is for the final head, which "
            "tuning.trainable = heads does not train; leave it out, or train lora, mlp, last:K, backbone or all"
        )
    if not math.isfinite(tuning.lora_alpha) or tuning.lora_alpha == 0:
        raise InputError(f"tuning.lora_alpha must be a number other than 0, got {tuning.lora_alpha:g}")
    if trained.has_backbone and tuning.forward_chunk_length:
        raise InputError(
            f"tuning.forward_chunk_length = {tuning.forward_chunk_length} is for frozen layers, and tuning.trainable = "
            f"{tuning.trainable} goes backward through them; leave one of them out"
        )
    if trained.has_backbone and tuning.divide_by_token_weights:
        raise InputError(
            f"tuning.divide_by_token_weights divides each exit's loss by another number, and tuning.trainable = "
            f"{tuning.trainable} adds the losses up; leave one of them out"
        )


def check_shared_head(exits: ExitsSection, tuning: TuningSection) -> None:
    """Raises InputError where exits that share the final head, or draws of one depth, do not fit the other keys."""
    if exits.output != "shared" and tuning.depths.kind == "random":
        raise InputError(
            "tuning.depth_sampling = random is for exits.output = shared, whose exits have no weights of their own, got "
            f"{exits.output}; use rotate:N, or share the final head"
        )
    if exits.output != "shared":
        if exits.output == "tied" and exits.exit_layers and exits.path is None:
            check_tied(tuning)
        return
    if not tuning.trained.has_backbone:
        raise InputError(
            "exits.output = shared trains nothing where tuning.trainable is heads; train lora, mlp, last:K, half, backbone or "
            "all, too, or use tied"
        )
    if exits.path is not None:
        raise InputError(
            f"exits.output = shared is for exits without weights of their own, and exits.path = {exits.path} holds some; "
            "give --exit-layers instead"
        )


def objective(tuning: TuningSection) -> Objective:
    """Parses tuning.loss, whose items are `name` or `name=weight`. Raises InputError where that fails."""
    return _objective("loss", tuning.loss, tuning)


def final_objective(tuning: TuningSection) -> Objective:
    """Does for tuning.final_loss what `objective` does for tuning.loss."""
    default = "cross_entropy" if tuning.teacher_model is None else "forward_kl"
    found = _objective("final_loss", tuning.final_loss or (default,), tuning)
    if found.wants_teacher and tuning.teacher_model is None:
        raise InputError(
            f"tuning.final_loss = {','.join(tuning.final_loss)} needs a teacher; give tuning.teacher_model, or use "
            "cross_entropy"
        )
    return found


def _objective(key: str, items: tuple[str, ...], tuning: TuningSection) -> Objective:
    weights: dict[str, float] = {}
    for item in items:
        name, equals, written = item.partition("=")
        name = name.strip()
        if name not in _TERMS:
            raise InputError(
                f"tuning.{key} must be made of {', '.join(_TERMS)}, got {item!r}; for example cross_entropy=0.3,forward_kl=0.7"
            )
        if name in weights:
            raise InputError(f"tuning.{key} must name each loss once, got {name} twice")
        weights[name] = _weight(written, item, key) if equals else 1.0
    if not weights:
        raise InputError(f"tuning.{key} must name a loss, got none; the usual one is cross_entropy")
    return Objective(**dict.fromkeys(_TERMS, 0.0) | weights, weighs_by_confidence=tuning.token_weights == "confidence")


def loss_weights(tuning: TuningSection, exit_layers: tuple[int, ...]) -> dict[int, float]:
    """Returns the weight of each exit's loss; without explicit weights, that of the preset.

    Raises InputError where they do not fit the exits.
    """
    _check_loss_weights(tuning.loss_weights, exit_layers, may_be_zero=tuning.trained.has_backbone)
    if tuning.depths.every > max(len(exit_layers), 1):
        raise InputError(
            f"tuning.depth_sampling = rotate:N must have at most as many as there are exits, {len(exit_layers)}, got "
            f"{tuning.depth_sampling}: some steps would train none"
        )
    if not exit_layers:
        return {}
    deepest = max(exit_layers)
    preset = [layer / deepest if tuning.loss_weight_preset == "depth" else 1.0 for layer in exit_layers]
    return dict(zip(exit_layers, tuning.loss_weights or preset, strict=True))


def _weight(written: str, item: str, key: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"a weight in tuning.{key} must be a number above 0, got {item!r}; leave out losses that are not wanted"
        )
    return weight


def _check_loss_weights(weights: tuple[float, ...], exit_layers: tuple[int, ...], *, may_be_zero: bool) -> None:
    if not weights:
        return
    if len(weights) != len(exit_layers):
        raise InputError(
            f"tuning.loss_weights must give one weight per exit, {len(exit_layers)} for the exits "
            f"{','.join(map(str, exit_layers))}, got {len(weights)}"
        )
    wrong = [weight for weight in weights if not 0 <= weight < float("inf")]
    if wrong:
        raise InputError(f"tuning.loss_weights must be at least 0 and finite, got {wrong[0]}; 0 freezes an exit")
    if not any(weights) and not may_be_zero:
        raise InputError(
            "tuning.loss_weights must leave an exit to train, got 0 for each; give one of them a weight above 0"
        )
