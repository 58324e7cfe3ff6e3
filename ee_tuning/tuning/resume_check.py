"""Checks that a run folder belongs to the same job, so that the same command continues it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError

CONFIG = "config.yaml"
"""The resolved job, within the folder."""
_FREE_SECTIONS = ("parallel", "generation")
_FREE = {
    "model.path",
    "model.config",
    "model.trust_pickle",  # the fingerprint identifies the model
    "exits.verify",
    "data.cache",
    "data.workers",
    "tuning.run_folder",
    "tuning.micro_batch_size",
    "tuning.loss_chunk_tokens",
    "tuning.log_interval",
    "tuning.eval_interval",
    "tuning.eval_iters",
    "tuning.compare_final",
    "tuning.save_interval",
    "tuning.save_minutes",
    "tuning.async_save",
    "tuning.keep_checkpoints",
    "tuning.resume",
    "tuning.allow_config_change",
    "tuning.stop_exit_code",
    "tuning.wandb_project",
}
"""Keys that may differ: they change where and how a run is computed and logged, and not its result."""
_MOST_LISTED = 5


def check_resumable(config: Config, folder: Path) -> None:
    """Raises InputError where the job of the run in `folder` differs in more than layout and logging."""
    if config.tuning.allow_config_change or not (folder / CONFIG).exists():
        return
    former = load_config(folder / CONFIG)
    changes = [
        f"{key} ({_shown(there)} there, {_shown(here)} here)" for key, there, here in _differences(former, config)
    ]
    if changes:
        more = f" and {len(changes) - _MOST_LISTED} more" if len(changes) > _MOST_LISTED else ""
        raise InputError(
            f"{folder} holds a run of another job, which differs in {', '.join(changes[:_MOST_LISTED])}{more}; give another "
            "tuning.run_folder, or --allow-config-change to go on with the new values"
        )


def _differences(former: Config, config: Config) -> list[tuple[str, Any, Any]]:
    found = []
    for section in fields(Config):
        if section.name in _FREE_SECTIONS:
            continue
        there, here = getattr(former, section.name), getattr(config, section.name)
        for field in fields(here):
            key, values = f"{section.name}.{field.name}", (getattr(there, field.name), getattr(here, field.name))
            if key not in _FREE and values[0] != values[1]:
                found.append((key, *values))
    return found


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
