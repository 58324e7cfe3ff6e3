"""Checks that a run folder belongs to the same job, so that the same command continues it."""

from pathlib import Path
from typing import Any

from ee_tuning.config import Config, load_config
from ee_tuning.differences import differences_text
from ee_tuning.errors import InputError

CONFIG = "config.yaml"
"""The resolved job, within the folder."""
_FREE_SECTIONS = ("parallel", "generation")
_FREE = {
    "model.path",
    "model.config",
    "model.adapter",
    "model.trust_pickle",  # the fingerprint identifies the model
    "exits.verify",
    "data.cache",
    "data.workers",
    "tuning.run_folder",
    "tuning.micro_batch_size",
    "tuning.loss_chunk_tokens",
    "tuning.forward_chunk_length",
    "tuning.recompute_activations",
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


def check_resumable(config: Config, folder: Path) -> None:
    """Raises InputError where the job of the run in `folder` differs in more than layout and logging."""
    if config.tuning.allow_config_change or not (folder / CONFIG).exists():
        return
    if changes := differences_text(_fixed_values(load_config(folder / CONFIG)), _fixed_values(config)):
        raise InputError(
            f"{folder} holds a run of another job, which differs in {changes}; give another tuning.run_folder, or "
            "--allow-config-change to go on with the new values"
        )


def _fixed_values(config: Config) -> dict[str, Any]:
    """Returns the values of a job that a resumed run must have, too. Keys that describe new exits are not among them
    where the exits are an artifact.
    """
    return {
        f"{section}.{key}": value
        for section, values in vars(config).items()
        if section not in _FREE_SECTIONS
        for key, value in vars(values).items()
        if f"{section}.{key}" not in _FREE and (section != "exits" or key == "path" or values.path is None)
    }
