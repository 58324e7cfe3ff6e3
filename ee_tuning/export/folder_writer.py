"""Writes a Hugging Face folder by all processes together: weights, the model's other files, config.json, manifest."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ee_tuning.checkpoint.huggingface_files import FileToWrite
from ee_tuning.export.export_source import ExportSource
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.atomic_write import REMEDY
from ee_tuning.storage.hashed_file import HashedFile
from ee_tuning.storage.non_finite import NonFiniteCheck, warn_non_finite
from ee_tuning.storage.shared_folder import write_shared_folder

MARKS = ("config.json", "model*.safetensors*")
"""File patterns that identify an export as a Hugging Face folder."""


def write_folder(
    model: ExportSource,
    files: Sequence[FileToWrite],
    output: Path,
    topology: Topology | None,
    complete: Callable[[Path], None],
    remedy: str = REMEDY,
) -> None:
    """Writes `files`, which the ranks share, into a folder that becomes `output` when it is complete.

    Rank 0 then calls `complete`, which writes the other files, config.json last, so that nothing loads a killed export.
    Raises InputError where the disk refuses, or a file of the model is altered.
    """

    def write(partial: Path, own: list[FileToWrite], advance: Advance) -> tuple[dict[str, str], list[str]]:
        watch = NonFiniteCheck()
        sums = {file.name: _written(file, partial, watch, advance) for file in own}
        model.finish_check()
        return sums, watch.lines()

    def finish(partial: Path, reports: list[tuple[dict[str, str], list[str]]]) -> dict[str, str]:
        warn_non_finite(model.source.folder, [line for _, lines in reports for line in lines])
        complete(partial)
        return {file: digest for sums, _ in reports for file, digest in sums.items()}

    write_shared_folder(
        output,
        topology,
        {file: file.num_bytes for file in files},
        write,
        finish,
        num_bytes=sum(file.num_bytes for file in files if file.link_to is None),
        description="writing the model",
        remedy=remedy,
    )


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies each file to its name in `folder`."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _written(file: FileToWrite, partial: Path, watch: NonFiniteCheck, advance: Advance) -> str:
    """Writes or links a file, and returns its sha256."""
    target = partial / file.name
    if file.link_to is not None:
        try:
            os.link(file.link_to, target)
        except OSError:  # another disk, or a file system without hard links
            target.symlink_to(os.path.relpath(file.link_to, partial.resolve()))
    with HashedFile(None if file.link_to is not None else target) as made:
        for block in file.blocks(watch):
            advance(made.write(block))
    return made.sha256
