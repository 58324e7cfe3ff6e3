"""The report of `--profile FOLDER`: a table of the time by part and stage, and a trace of some steps for Chrome or
Perfetto.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import gather_lists
from ee_tuning.parallel.time_parts import REST, TRACED, TimeParts, measured_parts
from ee_tuning.parallel.topology import Topology
from ee_tuning.text_table import table_lines

PARTS, TRACE = "parts.json", "trace.json"


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
    with measured_parts(modules) as parts:
        yield
    ranks = gather_lists([(topology.rank, topology.stage, parts)], topology)
    if not topology.is_logging_rank:
        return
    tree = [
        {"rank": rank, "stage": stage, "steps": each.steps, "seconds": each.seconds, "calls": each.calls}
        for rank, stage, each in ranks
    ]
    (folder / PARTS).write_text(to_json(tree, indent=2) + "\n", encoding="utf-8")
    (folder / TRACE).write_text(to_json(_trace(ranks)) + "\n", encoding="utf-8")
    stages = {stage: each for _, stage, each in reversed(ranks)}  # the first rank of each stage
    say("\n".join(report_lines([stages[stage] for stage in sorted(stages)])))
    say(
        f"wrote {folder / PARTS}, and {folder / TRACE}: steps {TRACED[0]} to {TRACED[-1]} of each rank, for ui.perfetto.dev"
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


def _trace(ranks: list[tuple[int, int, TimeParts]]) -> dict[str, Any]:
    """Returns the calls of all ranks as Chrome's trace events: a process for each rank, on one clock."""
    events: list[dict[str, Any]] = []
    for rank, stage, parts in ranks:
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}, stage {stage}"}})
        for name, began, ended in parts.events:
            times = {"ts": began / 1e3, "dur": (ended - began) / 1e3}
            events.append({"name": name, "ph": "X", "pid": rank, "tid": 0, **times})
    return {"traceEvents": events}
