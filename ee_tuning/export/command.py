"""`ee-tuning export`: dispatches to the writers, and runs the optional check."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ee_tuning.config import Config, ParallelSection
from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from ee_tuning.parallel.topology import Topology

FLAGS = {
    "artifact": ("only", "drop", "merge", "add"),
    "hf": ("link", "check", "text", "tolerance"),
    "megatron": (),
    "eagle3": (),
    "speculators": (),
    "draft": ("exit", "fold_bias", "check", "text", "tolerance"),
    "pruned": ("exit", "fold_bias", "check", "text", "tolerance"),
}
"""Format -> flags that only some formats accept."""
HUGGINGFACE = ("hf", "draft", "pruned")
"""Formats that are Hugging Face folders, with a tokenizer."""
DRAFTERS = ("eagle3", "speculators")
"""Formats of drafting heads only."""
NEW_EXITS = {"exits.architecture", "exits.adapter_rank", "exits.init", "exits.seed"}
"""Keys that describe the exits of --add. The exits of --exits are as they are."""


def export(config: Config, flags: argparse.Namespace) -> int:
    """Writes `flags.output` in `flags.format` and returns the exit code: 1 where `flags.check` finds a difference.

    Raises InputError on flags that do not go together, and like the format's writer.
    """
    _check_flags(flags)
    _check_kind(config, flags)
    if flags.format in DRAFTERS:
        _write_drafter(config, flags)
        return 0
    if flags.format == "artifact":
        _write_artifact(config, flags)
        return 0
    if not config.model.path:
        raise InputError(
            f"--format {flags.format} writes the model too, got none; give --model FOLDER or a config file"
        )
    if "exit" in FLAGS[flags.format]:
        _check_exit_layer(config, flags)
    if flags.check and not config.exits.path:
        raise InputError("--check compares exits, got none; give --exits FOLDER, or leave --check out")
    text = ""
    if flags.check or flags.fold_bias:  # before minutes of writing
        from ee_tuning.export.check import check_long_enough

        check_long_enough(config, text := _text(flags.text))
    constant = None
    if flags.fold_bias:
        from ee_tuning.export.constant_direction import constant_direction

        constant = constant_direction(config, flags.exit, text)
    from ee_tuning.parallel.topology import world_size

    _write_merged(config, flags, constant, is_shared=world_size() > 1)
    return 0 if not flags.check or _is_equal(config, flags, text, is_exact=constant is None) else 1


def _check_flags(flags: argparse.Namespace) -> None:
    """Raises InputError on flags that do not go together."""
    for name in dict.fromkeys(name for names in FLAGS.values() for name in names):
        if getattr(flags, name) not in (None, False, []) and name not in FLAGS[flags.format]:
            formats = " or ".join(kind for kind, names in FLAGS.items() if name in names)
            raise InputError(
                f"--{name.replace('_', '-')} goes with --format {formats}, got --format {flags.format}; leave one of them out"
            )
    if flags.tolerance is not None and not (flags.check and 0 < flags.tolerance < float("inf")):
        raise InputError(
            f"--tolerance must be a difference above 0 and go with --check, got {flags.tolerance:g}"
            f"{'' if flags.check else ' without it'}; leave it out, or give --check"
        )
    if flags.text is not None and not (flags.check or flags.fold_bias):
        raise InputError(
            f"--text {flags.text} is read by --check and --fold-bias, got neither; give one, or leave it out"
        )
    if (of_new := sorted(NEW_EXITS & flags.overrides.keys())) and not flags.add:
        raise InputError(f"{', '.join(of_new)} is of new exits, and none is asked for; give --add N, or leave it out")
    if flags.format == "artifact" or flags.check or flags.fold_bias:
        _check_one_process("--format artifact, --check and --fold-bias are")


def _check_one_process(what: str) -> None:
    from ee_tuning.parallel.topology import world_size

    if (num_processes := world_size()) > 1:
        raise InputError(f"{what} for one process, got {num_processes}; start it without torchrun")


def _is_equal(config: Config, flags: argparse.Namespace, text: str, *, is_exact: bool) -> bool:
    """Runs the check of an export, and prints what it finds."""
    from ee_tuning.export.check import check_export, check_plain_exit

    tolerance = () if flags.tolerance is None else (flags.tolerance,)
    if flags.format == "hf":
        return check_export(config, flags.output, text, *tolerance)
    return check_plain_exit(config, flags.output, flags.exit, text, *tolerance, is_exact=is_exact)


def _check_exit_layer(config: Config, flags: argparse.Namespace) -> None:
    if not config.exits.path:
        raise InputError(f"--format {flags.format} writes an exit as a model, got no exits; give --exits FOLDER")
    from ee_tuning.artifact.exit_config import read_exit_config
    from ee_tuning.artifact.exit_heads import check_is_artifact

    check_is_artifact(Path(config.exits.path))
    layers = read_exit_config(Path(config.exits.path)).exit_layers
    if flags.exit not in layers:
        raise InputError(
            f"--format {flags.format} writes the exit after layer --exit of {config.exits.path}, which has exits after "
            f"{', '.join(map(str, layers))}, got {'none' if flags.exit is None else flags.exit}; give --exit {layers[0]}"
        )


def _check_kind(config: Config, flags: argparse.Namespace) -> None:
    """Raises InputError where the format does not suit the heads in exits.path, or those to be merged or added."""
    from ee_tuning.artifact.exit_config import read_exit_config
    from ee_tuning.artifact.exit_heads import check_is_artifact

    if config.exits.drafts:
        raise InputError(
            "--add adds exits, and eagle3 is a drafting head, which stands alone; use another --architecture"
        )
    paths = [path for path in (config.exits.path, flags.merge) if path is not None]
    if flags.format in DRAFTERS and config.exits.path is None:
        raise InputError(f"--format {flags.format} writes a drafting head, got none; give --exits FOLDER")
    for path in map(Path, paths):
        check_is_artifact(path)
        if (read_exit_config(path).draft is None) == (flags.format in DRAFTERS):
            raise InputError(
                f"--format {flags.format} is not for what {path} holds; "
                + (
                    "it is for a drafting head (ee-tuning tune --architecture eagle3)"
                    if flags.format in DRAFTERS
                    else "a drafting head of EAGLE-3 stands alone: use --format eagle3 or --format speculators"
                )
            )


def _write_artifact(config: Config, flags: argparse.Namespace) -> None:
    from ee_tuning.export.export_artifact import ExitChoice, export_artifact
    from ee_tuning.storage.owner import owned

    layers = {name: _layers(name, getattr(flags, name)) for name in ("only", "drop", "add")}
    architecture = config.exits.architecture if "exits.architecture" in flags.overrides else ()
    adapter_rank = config.exits.adapter_rank if "exits.adapter_rank" in flags.overrides else None
    choice = ExitChoice(**layers, merge=flags.merge, architecture=architecture, adapter_rank=adapter_rank)
    with owned(flags.output, None):
        export_artifact(config, flags.output, choice, overwrite=flags.overwrite)
    print(f"wrote {flags.output}")


def _write_drafter(config: Config, flags: argparse.Namespace) -> None:
    _check_one_process(f"--format {flags.format} is")
    if not config.model.path:
        raise InputError(
            f"--format {flags.format} describes the model that is drafted for, got none; give --model FOLDER"
        )
    from ee_tuning.export.export_eagle3 import export_eagle3
    from ee_tuning.storage.owner import owned

    with owned(flags.output, None):
        export_eagle3(config, flags.output, flags.format, overwrite=flags.overwrite)
    print(f"wrote {flags.output}; its README.md says how engines load it")


def _write_merged(
    config: Config, flags: argparse.Namespace, constant: "Tensor | None" = None, *, is_shared: bool
) -> None:
    from ee_tuning.checkpoint.formats import open_model

    with open_model(config.model).source:
        pass  # before the processes meet, so that a mistake is reported at once
    from ee_tuning.export.tokenizer_files import with_tokenizer_files

    with with_tokenizer_files(config) if flags.format in HUGGINGFACE else nullcontext(config) as config:
        topology = None
        if is_shared:
            from ee_tuning.parallel.topology import init_parallel

            topology = init_parallel(ParallelSection())
        from ee_tuning.storage.owner import owned

        with owned(flags.output, topology):
            _write_format(config, flags, topology, constant)
    if topology is None or topology.is_logging_rank:
        print(f"wrote {flags.output}", flush=True)
    if is_shared:
        from ee_tuning.parallel.topology import destroy_parallel

        destroy_parallel()


def _write_format(
    config: Config, flags: argparse.Namespace, topology: "Topology | None", constant: "Tensor | None"
) -> None:
    if flags.format == "megatron":
        from ee_tuning.export.megatron_writer import write_megatron

        return write_megatron(config, flags.output, topology, overwrite=flags.overwrite)
    from ee_tuning.export.tokenizer_files import special_tokens

    shared: dict[str, Any] = {"overwrite": flags.overwrite, "special": special_tokens(config)}
    if flags.format == "hf":
        from ee_tuning.export.export_huggingface import export_huggingface

        return export_huggingface(config, flags.output, topology, links=flags.link, **shared)
    from ee_tuning.export.export_draft import export_draft

    export_draft(config, flags.output, flags.exit, topology, kind=flags.format, constant=constant, **shared)


def _text(path: Path | None) -> str:
    """Returns the text of the check, by default the source of argparse, which every Python has."""
    path = path or Path(argparse.__file__)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--text must be a text file, and {path} can not be read: {error}") from error


def _layers(flag: str, words: list[str]) -> tuple[int, ...]:
    """Parses 3,6 or 3 6."""
    parts = [part for word in words for part in word.split(",") if part.strip()]
    for part in parts:
        if not part.strip().isdecimal():
            raise InputError(f"--{flag} takes layer numbers, got {part!r}; for example --{flag} 3,6")
    return tuple(map(int, parts))
