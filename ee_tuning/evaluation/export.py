"""`ee-tuning export`: which writer gets the job, and the check that may follow."""
import argparse
import os
from pathlib import Path

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.model.config import read_model_config

FLAGS = {"artifact": ("only", "drop", "merge", "add"), "hf": ("link", "check", "text"), "megatron": ()}
"""Format -> the flags that only some formats take."""


def export(config: Config, flags: argparse.Namespace) -> int:
    """Writes `flags.output` in `flags.format`; the exit code: 1 where `flags.check` finds that the export says something else.

    Raises InputError on flags that do not go together, and as the format's writer does.
    """
    for name in dict.fromkeys(name for names in FLAGS.values() for name in names):
        if getattr(flags, name) and name not in FLAGS[flags.format]:
            formats = " or ".join(kind for kind, names in FLAGS.items() if name in names)
            raise InputError(f"--{name} goes with --format {formats}, got --format {flags.format}; leave one of them out")
    if flags.format != "megatron" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--format {flags.format} is written by one process, got {os.environ['WORLD_SIZE']}; start it without torchrun")
    if flags.format == "artifact":
        from ee_tuning.checkpoint.export_artifact import ExitChoice, export_artifact

        layers = {name: _layers(name, getattr(flags, name)) for name in ("only", "drop", "add")}
        architecture = config.exits.architecture if "exits.architecture" in flags.overrides else ()
        choice = ExitChoice(**layers, merge=flags.merge, architecture=architecture)
        export_artifact(config, flags.output, choice, overwrite=flags.overwrite)
        return 0
    if not config.model.path:
        raise InputError(f"--format {flags.format} writes the model too, got none; give --model FOLDER or a config file")
    _check_model(Path(config.model.path), flags.format)
    if flags.format == "hf":
        return _export_huggingface(config, flags)
    from ee_tuning.checkpoint.megatron_writer import export_megatron

    export_megatron(config, flags.output, overwrite=flags.overwrite)
    return 0


def _check_model(folder: Path, kind: str) -> None:
    """Raises InputError where the model is not what the merged formats are written from."""
    family = read_model_config(folder).family
    if family != "llama":
        raise InputError(f"--format {kind} writes models of the family llama, got {family} in {folder}; --format artifact takes any")


def _export_huggingface(config: Config, flags: argparse.Namespace) -> int:
    from ee_tuning.checkpoint.export_huggingface import export_huggingface

    if flags.check and not config.exits.path:
        raise InputError("--check compares exits, got none; give --exits FOLDER, or leave --check out")
    text = _text(flags.text)
    export_huggingface(config, flags.output, links=flags.link, overwrite=flags.overwrite)
    if not flags.check:
        return 0
    from ee_tuning.evaluation.export_check import check_export

    return 0 if check_export(config, flags.output, text, flags.tolerance) else 1


def _text(path: Path | None) -> str:
    """What an export is checked on; by default the source of argparse, which every Python has."""
    path = path or Path(argparse.__file__)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--text must be a text file, and {path} can not be read: {error}") from error


def _layers(flag: str, words: list[str]) -> tuple[int, ...]:
    """3,6 or 3 6."""
    parts = [part for word in words for part in word.split(",") if part.strip()]
    for part in parts:
        if not part.strip().isdecimal():
            raise InputError(f"--{flag} takes layer numbers, got {part!r}; for example --{flag} 3,6")
    return tuple(map(int, parts))
