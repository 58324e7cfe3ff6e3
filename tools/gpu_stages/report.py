"""The record of a run: OUT, which is replaced as a whole after each change, and a final table."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ee_tuning.json_file import to_json
from gpu_stages.checks import Finding, Outcome

LONGEST_TABLE = 60
"""Most lines of the table: some machines return only the end of a command's output."""


class Report:
    """The record of one run. Any thread may use it."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.outcomes: list[Outcome] = []
        self._path, self._facts, self._began, self._lock = path, facts, time.time(), threading.Lock()

    def write(self) -> None:
        """Replaces the file."""
        tree = {
            **self._facts,
            "seconds": time.time() - self._began,
            "checks": [each.tree() for each in list(self.outcomes)],
        }
        with self._lock:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(to_json(tree, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self._path)

    def cut_off(self, stack: str) -> None:
        """Records that the time of the running check is over, and where it was."""
        for outcome in self.outcomes:
            if outcome.state == "running":
                outcome.state, outcome.error = "cut off", f"{stack}its time was over, here"
                outcome.seconds = time.time() - outcome.began

    def table(self) -> str:
        """Returns all findings, or only those with a goal if all are too many; and the failed checks."""
        rows = [(outcome, finding) for outcome in self.outcomes for finding in outcome.findings]
        failed = [outcome.line for outcome in self.outcomes if outcome.state != "passed"]
        room = LONGEST_TABLE - 6 - len(failed[:15])
        if len(rows) > room:
            rows = sorted(rows, key=lambda row: row[1].is_met is None)[:room]
        states = [outcome.state for outcome in self.outcomes]
        lines = [
            "",
            f"{self._facts['device']}: {len(states)} checks, "
            + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
            "| stage | figure | value | goal | met |",
            "|---|---|---|---|---|",
            *(_row(*row) for row in rows),
            *failed[:15],
        ]
        return "\n".join(lines)

    @property
    def has_failed(self) -> bool:
        """Whether any check failed or was cut off."""
        return any(outcome.state in ("failed", "cut off") for outcome in self.outcomes)


def facts_of(device: torch.device, stages: list[int], is_tiny: bool) -> dict[str, Any]:
    """Returns facts about the run: device, date, versions."""
    import transformers

    found = {
        "device": "CPU",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stages": stages,
        "is_tiny": is_tiny,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": card.name,
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def _row(outcome: Outcome, finding: Finding) -> str:
    value = finding.value if isinstance(finding.value, str) else f"{finding.value:,.4g}"
    met = {True: "yes", False: "NO", None: ""}[finding.is_met]
    return f"| {outcome.stage} | {finding.what} | {value}{' ' + finding.unit if finding.unit else ''} | {finding.goal} | {met} |"
