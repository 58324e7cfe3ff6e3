"""Writes a folder by all processes together: each writes its share, and rank 0 completes the folder and its manifest.

Every folder of this project is written in this way: artifacts, exports and checkpoints of a run.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from ee_tuning.parallel.collectives import gather_lists, on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.progress import Advance, byte_progress
from ee_tuning.storage.atomic_write import REMEDY, atomic_folder, check_room, os_errors_as_input_errors
from ee_tuning.storage.manifest import write_manifest
from ee_tuning.storage.work_partition import share_of

Item = TypeVar("Item")
Report = TypeVar("Report")


def write_shared_folder(
    output: Path,
    topology: Topology | None,
    sizes: Mapping[Item, int],
    write: Callable[[Path, list[Item], Advance], Report],
    complete: Callable[[Path, list[Report]], Mapping[str, str]],
    *,
    num_bytes: int,
    description: str | None = None,
    remedy: str = REMEDY,
) -> None:
    """Writes a folder that becomes `output` when it is complete, and not before. All ranks call it.

    `sizes` holds the bytes of each item of the work. On every rank `write` gets the temporary folder, the rank's share
    of the items, and a function that advances the bar `description`; it may run collectives. On rank 0 `complete` gets
    the reports of all ranks and writes the other files; it returns known sha256 sums by file name for the manifest.

    Raises InputError where less than `num_bytes` are free or the disk refuses. `output` is then as it was.
    """
    rank, world = (0, 1) if topology is None else (topology.rank, topology.world_size)
    own = share_of(sizes, rank, world)
    is_shown = description is not None and rank == 0
    with atomic_folder(output, topology, remedy) as partial:
        on_first_rank(topology, lambda: check_room(output, partial, num_bytes, remedy))
        with byte_progress(description or "", sum(sizes[item] for item in own), is_shown=is_shown) as advance:
            report = write(partial, own, advance)
        with nullcontext() if topology is None else hang_watchdog(topology, f"other ranks to write to {output}"):
            reports = gather_lists([report], topology)

        def finish() -> None:
            with os_errors_as_input_errors(output, remedy):
                write_manifest(partial, complete(partial, reports))

        on_first_rank(topology, finish)
