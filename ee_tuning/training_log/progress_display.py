"""Progress of a run for the user: a bar at a terminal, a line now and then elsewhere, and every line in log.txt."""

import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from ee_tuning.losses.drafting import MEAN_LENGTH
from ee_tuning.notices import say
from ee_tuning.progress import progress_bar, time_left

_SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """Shows loss per exit, tokens per second and time left. A context manager, for the logging rank."""

    def __init__(self, log: Path, num_steps: int, first_step: int) -> None:
        """The run takes steps `first_step` + 1 .. `num_steps`."""
        self._log = log.open("a", encoding="utf-8")
        self._num_steps, self._first_step = num_steps, first_step
        self._began = time.monotonic()
        self._printed_at = -_SECONDS_BETWEEN_LINES
        self._skipping: set[str] = set()
        self._bar = progress_bar(
            TextColumn("tuning"), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}")
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step)

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._log.close()

    def show(self, record: dict[str, Any]) -> None:
        """Shows one record of metrics.jsonl."""
        losses = " ".join(f"{layer}: {loss:.3f}" for layer, loss in record["loss"].items())
        if record["kind"] == "validation":
            lengths = " ".join(f"{layer}: {length:.2f}" for layer, length in record.get(MEAN_LENGTH, {}).items())
            told = f" · mean acceptance length {lengths}" if lengths else ""
            self.say(f"step {record['step']} · validation loss of exit {losses}{told}")
            return
        self._bar.update(
            self._task,
            completed=record["step"],
            description=f"loss {losses} · {record['tokens_per_second']:,.0f} tokens/s",
        )
        line = f"step {record['step']}/{self._num_steps} · loss of exit {losses} · {record['tokens_per_second']:,.0f} tokens/s"
        if begun := record["skipped"].keys() - self._skipping:
            self.say(
                f"step {record['step']} · exit {', '.join(sorted(begun, key=int))} is not updated: its loss or gradient is not "
                "finite, its gradient norm is above tuning.skip_grad_norm, or the step has no token to learn"
            )
        self._skipping = set(record["skipped"])
        is_due = record["step"] == self._num_steps or time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES
        self._write(line)
        if self._bar.disable and is_due:
            self._printed_at = time.monotonic()
            seconds, first = time.monotonic() - self._began, self._first_step
            say(f"{line} · {time_left(seconds, record['step'] - first, self._num_steps - first)} left")

    def say(self, line: str) -> None:
        """Writes a line to the log and shows it."""
        self._write(line)
        if self._bar.disable:
            say(line)
        else:
            self._bar.console.print(line, highlight=False)

    def _write(self, line: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._log.flush()
