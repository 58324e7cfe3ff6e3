"""Writes a run's checkpoints in the background: a copy is taken at the end of a step, and a thread does the rest.

The threads of all ranks meet on a process group of their own. Stages do not wait for each other: each copies its state
when it reaches the end of the step.
"""

import dataclasses
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ee_tuning.config import TuningSection
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.pinned_staging import PinnedStaging
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.atomic_write import atomic_file, remove_leftovers
from ee_tuning.storage.distcp_writer import Chunk, DistcpWriter, StoredChunk, write_common, write_metadata
from ee_tuning.storage.shared_folder import write_shared_folder
from ee_tuning.tuning.state import CHECKPOINTS, LATEST, PROGRESS, Trained, TrainingProgress, own_state


class Saver:
    """Writes this rank's part of a run's checkpoints, one at a time. Create it before the relay starts."""

    def __init__(self, trained: Trained, config: ModelConfig, tuning: TuningSection, topology: Topology) -> None:
        self._trained, self._config, self._training_topology = trained, config, topology
        self._folder = Path(tuning.run_folder) / CHECKPOINTS
        self._keep = tuning.keep_checkpoints
        self._is_async = tuning.async_save
        self._topology = dataclasses.replace(topology, world_control=topology.save_control)
        self._copy = PinnedStaging([tensor for _, tensor in self._own_state()])
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written. No further one is tried then. All ranks agree after `wait`."""
        return self._failure is not None

    def save(self, progress: TrainingProgress, before_latest: Callable[[], None]) -> None:
        """Copies the state and returns, while a thread writes the copy.

        The thread calls `before_latest` on rank 0 when all ranks have written, before `latest` is updated. All ranks
        call `save` after the same step, each in its own time. It waits for the former checkpoint and, without
        tuning.async_save, for this one.
        """
        self.wait()
        if self.has_failed:
            return
        chunks, tensors = zip(*state, strict=True) if (state := self._own_state()) else ((), ())
        self._copy.copy_from(tensors)
        # A daemon: if training fails, the checkpoint in progress is given up together with the process.
        self._thread = threading.Thread(
            target=self._run, args=(progress, chunks, before_latest), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._is_async:
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint in progress, if any. Afterwards all ranks agree on `has_failed`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raises the failure of a checkpoint, on all ranks, after `wait`: an InputError where the disk refused."""
        if self._failure is None:
            return
        if isinstance(self._failure, InputError):
            self._topology.barrier()  # no rank leaves while another one still waits for its micro-batches
        raise self._failure

    def _own_state(self) -> list[tuple[Chunk, Tensor]]:
        """Returns the tensors that this rank writes. Of ranks with the same tensor the first one writes it."""
        state = own_state(self._trained, self._config, self._training_topology)
        return [
            (
                Chunk(
                    each.key, each.dtype, tuple(each.global_shape), tuple(each.global_offset), tuple(each.local_shape)
                ),
                each.data,
            )
            for each in state.values()
            if each.replica_id == 0 and each.data is not None
        ]

    def _run(self, progress: TrainingProgress, chunks: Sequence[Chunk], before_latest: Callable[[], None]) -> None:
        try:
            self._write(progress, chunks, before_latest)
        except Exception as error:  # raised later by `check`
            self._failure = error

    def _write(self, progress: TrainingProgress, chunks: Sequence[Chunk], before_latest: Callable[[], None]) -> None:
        folder, topology = self._folder / f"step_{progress.step:08d}", self._topology

        def write(partial: Path, own: list[Chunk], advance: Advance) -> _RankReport:
            return self._write_own(partial, folder, chunks)

        write_shared_folder(
            folder, topology, {}, write, lambda partial, reports: _complete(partial, progress, reports), num_bytes=0
        )

        def finish() -> None:
            before_latest()
            _update_latest(folder, self._keep)

        on_first_rank(topology, finish)

    def _write_own(self, partial: Path, folder: Path, chunks: Sequence[Chunk]) -> "_RankReport":
        try:
            with DistcpWriter(partial, self._topology.rank, lambda num_bytes: None, beside_other_work=True) as writer:
                for chunk, tensor in zip(chunks, self._copy.tensors(), strict=True):
                    writer.add_tensor(chunk, [tensor])
            return _RankReport(writer.written, writer.sums)
        except Exception as error:  # any exception: all ranks must meet here, or the others wait forever
            return _RankReport([], {}, _refusal(folder, error))


@dataclass(frozen=True)
class _RankReport:
    """The files that a rank wrote, or the reason for its failure."""

    written: list[StoredChunk]
    sums: dict[str, str]
    refusal: str | None = None


def _refusal(folder: Path, error: Exception) -> str:
    reason = " ".join(str((error.strerror if isinstance(error, OSError) else None) or repr(error)).split())
    free = shutil.disk_usage(folder.parent).free // 2**20
    return (
        f"the checkpoint {folder} can not be written: {reason} (with {free} MiB free there); make room, and give the "
        "same command again, which continues from the former checkpoint"
    )


def _complete(partial: Path, progress: TrainingProgress, reports: list[_RankReport]) -> dict[str, str]:
    if refused := [each.refusal for each in reports if each.refusal]:
        raise InputError(refused[0])
    write_common(partial, {})
    write_metadata(partial, [each for report in reports for each in report.written])
    (partial / PROGRESS).write_text(to_json(dataclasses.asdict(progress), indent=2) + "\n", encoding="utf-8")
    return {file: digest for report in reports for file, digest in report.sums.items()}


def _update_latest(folder: Path, keep: int) -> None:
    """Makes `latest` name `folder`, and removes all but the last `keep` checkpoints."""
    with atomic_file(folder.parent / LATEST) as pointer:
        pointer.write_text(folder.name + "\n", encoding="utf-8")
    # Left by a killed save, at a step where no other save may follow.
    for partial in folder.parent.glob("step_????????.partial-*"):
        remove_leftovers(partial.with_name(partial.name.partition(".")[0]))
    found = sorted(folder.parent.glob("step_????????"))
    older, newer = found[: found.index(folder)], found[found.index(folder) + 1 :]
    # Newer ones: the run went on from a checkpoint before them.
    for each in newer + older[: max(len(older) - keep + 1, 0)]:
        shutil.rmtree(each, ignore_errors=True)
