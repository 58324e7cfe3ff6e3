"""Writes a Hugging Face folder by all processes together: weights file by file, other files of the model, config.json,
and the manifest at the end.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ee_tuning.checkpoint.atomic_write import REMEDY, atomic_folder, check_room, os_errors_as_input_errors
from ee_tuning.checkpoint.byte_progress import Advance, byte_progress
from ee_tuning.checkpoint.export_source import ExportSource
from ee_tuning.checkpoint.hashed_file import HashedFile
from ee_tuning.checkpoint.huggingface_files import FileToWrite
from ee_tuning.checkpoint.manifest import write_manifest
from ee_tuning.checkpoint.non_finite import NonFiniteCheck, warn_non_finite
from ee_tuning.checkpoint.work_partition import share_of
from ee_tuning.parallel.collectives import gather_lists, on_first_rank
from ee_tuning.parallel.topology import Topology


def write_folder(
    model: ExportSource,
    files: Sequence[FileToWrite],
    output: Path,
    topology: Topology | None,
    complete: Callable[[Path], None],
    remedy: str = REMEDY,
) -> None:
    """Writes `files`, which the ranks share, into a folder that becomes `output` when it is whole. Rank 0 then calls
    `complete` with it, which writes the rest, config.json last: what a killed export leaves loads nowhere.

    Raises InputError where the disk refuses, or a file of the model is found altered.
    """
    rank, world = (0, 1) if topology is None else (topology.rank, topology.world_size)
    with atomic_folder(output, topology) as partial:
        num_bytes = sum(file.num_bytes for file in files if file.link_to is None)
        on_first_rank(topology, lambda: check_room(output, partial, num_bytes, remedy))
        own = share_of({file: file.num_bytes for file in files}, rank, world)
        watch, sums = NonFiniteCheck(), {}
        with byte_progress("writing the model", sum(file.num_bytes for file in own), is_shown=rank == 0) as advance:
            for file in own:
                sums[file.name] = _written(file, partial, output, watch, advance)
        model.finish_check()
        done = gather_lists([(sums, watch.lines())], topology)
        on_first_rank(topology, lambda: _finish(model, partial, output, done, complete))


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies each file to its name in `folder`."""
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _finish(
    model: ExportSource,
    partial: Path,
    output: Path,
    done: list[tuple[dict[str, str], list[str]]],
    complete: Callable[[Path], None],
) -> None:
    sums: dict[str, str] = {}
    for own, lines in done:
        sums |= own
        warn_non_finite(model.source.folder, lines)
    with os_errors_as_input_errors(output):
        complete(partial)
        write_manifest(partial, sums)


def _written(file: FileToWrite, partial: Path, output: Path, watch: NonFiniteCheck, advance: Advance) -> str:
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
