"""The report of `--profile FOLDER`: a table of the time by part and stage, and a trace of some steps for Chrome or
Perfetto.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import gather_lists
from ee_tuning.parallel.time_parts import REST, TimeParts, measured_parts
from ee_tuning.parallel.topology import Topology
from ee_tuning.text_table import table_lines

FIRST_TRACED, NUM_TRACED = 3, 5
"""Steps of the trace: the first ones of a process allocate and compile."""
PARTS, TRACE = "parts.json", "trace-rank-{}.json"


def check_profile_folder(folder: Path) -> None:
    """Raises InputError where `folder` can not be a new folder of a profile."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--profile must name a new or empty folder, and {folder} is not; give another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--profile must name a folder that can be made, and {folder} can not: {error.strerror}"
        ) from error


@contextmanager
def time_report(folder: Path | None, topology: Topology, modules: dict[str, list[nn.Module]]) -> Iterator[None]:
    """Measures the block and writes `folder`, if it is given. All ranks call it. `modules` are those of
    `measured_parts`.
    """
    if folder is None:
        yield
        return
    with _Trace(folder / TRACE.format(topology.rank)) as trace, measured_parts(modules) as parts:
        parts.on_step = lambda: trace.count(parts.steps)
        yield
    is_one = topology.tp_rank == 0 and topology.dp_rank == 0
    measured = gather_lists([(topology.stage, parts)] if is_one else [], topology)
    if not topology.is_logging_rank:
        return
    tree = [{"stage": s, "steps": p.steps, "seconds": p.seconds, "calls": p.calls} for s, p in measured]
    (folder / PARTS).write_text(to_json(tree, indent=2) + "\n", encoding="utf-8")
    say("\n".join(report_lines([each for _, each in measured])))
    say(
        f"wrote {folder / PARTS}, and {folder / TRACE.format('N')} of steps {FIRST_TRACED} to {trace.last} of each rank"
    )


def report_lines(stages: list[TimeParts]) -> list[str]:
    """Returns the table: milliseconds a step, share of the time, and calls a step, of each part on each stage."""
    steps = max(1, stages[0].steps)
    whole = [sum(stage.seconds.values()) for stage in stages]
    names = sorted({name for stage in stages for name in stage.seconds}, key=lambda name: _rank(name, stages))
    head = ["part"]
    for number in range(len(stages)):
        head += [f"stage {number}: ms a step" if len(stages) > 1 else "ms a step", "share", "calls"]
    rows = []
    for name in names:
        row = [name]
        for stage, all_of_it in zip(stages, whole, strict=True):
            seconds = stage.seconds.get(name, 0.0)
            calls = stage.calls.get(name, 0) / steps
            row += [f"{seconds / steps * 1e3:.2f}", f"{seconds / all_of_it:.0%}", f"{calls:.1f}" if calls else ""]
        rows.append(row)
    total = ["all of it"]
    for all_of_it in whole:
        total += [f"{all_of_it / steps * 1e3:.2f}", "100%", ""]
    return [f"time by part over {stages[0].steps} steps", *table_lines(head, [*rows, total], num_left=1)]


def _rank(name: str, stages: list[TimeParts]) -> tuple[bool, float]:
    return name == REST, -sum(stage.seconds.get(name, 0.0) for stage in stages)


class _Trace:
    """torch's profiler over the traced steps. A run that ends before them has the trace of what there was."""

    def __init__(self, path: Path) -> None:
        self._path, self.last = path, 0
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(activities=kinds)
        self._is_on = False

    def __enter__(self) -> "_Trace":
        return self

    def count(self, steps: int) -> None:
        """Takes the number of steps that are done."""
        if steps == FIRST_TRACED - 1 and self._profiler is not None:
            self._profiler.start()
            self._is_on = True
        elif self._is_on:
            self.last = steps
            if steps == FIRST_TRACED + NUM_TRACED - 1:
                self._end()

    def _end(self) -> None:
        if self._is_on and self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
        self._is_on, self._profiler = False, None

    def __exit__(self, *error: object) -> None:
        self._end()
