"""Checks the places of outputs: writable, and apart from inputs, which they would overwrite or become."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ee_tuning.config import Config
from ee_tuning.errors import InputError

_MARKS = (("exit_config.json",), ("config.yaml", "metrics.jsonl"), ("config.yaml", "checkpoints"))
"""Names that occur together in a folder of this project."""


def check_apart(
    output: Path, sources: Iterable[str | Path | None], name: str = "--output", *, around: bool = False
) -> None:
    """Raises InputError where `output`, the value of `name`, is one of `sources` or lies within one of them.

    With `around`, also where a source lies within `output`. Sources that do not exist, such as names of models on the
    hub, do not count.
    """
    place = output.resolve()
    for source in [Path(each) for each in sources if each]:
        if not source.exists():
            continue
        there = source.resolve()
        if place == there:
            raise InputError(
                f"{name} must not be {source}, which is read to make it and would be lost; give another {name}"
            )
        if source.is_dir() and there in place.parents:
            raise InputError(
                f"{name} must lie apart from {source}, which is read, got {output} within it: what is written there would be "
                f"read with it; give another {name}"
            )
        if around and source.is_dir() and place in there.parents:
            raise InputError(
                f"{name} must lie apart from {source}, which is read, got {output} around it: it would be "
                f"overwritten; give another {name}"
            )


def check_beside(output: Path, config: Config, sources: Iterable[str | Path | None], name: str = "--output") -> None:
    """Like `check_apart`, for a file that a job in `config` makes: apart from `sources`, the model, the exits and the
    tokenizer.
    """
    inputs = (config.model.path, config.exits.path, config.data.tokenizer, config.data.chat_template)
    check_apart(output, (*sources, *inputs), name)


def check_folder_writable(folder: Path, name: str = "--output") -> None:
    """Raises InputError where `folder`, the value of `name`, can not be written. Changes nothing."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{name} must be a folder that can be written, got {folder}, and {existing} is "
            f"{'write-protected' if existing.is_dir() else 'a file'}; choose another"
        )


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a run, an artifact, or an unfinished one."""
    is_partial = re.search(r"\.(partial|replaced)-[0-9a-f]{8}$", folder.name) is not None
    return is_partial or any(all((folder / name).exists() for name in names) for names in _MARKS)
