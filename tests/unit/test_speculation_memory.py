"""What speculation learnt, kept for later processes: what comes back is what was known, and what is damaged or foreign
is made anew.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.engine.cost_model import Costs
from ee_tuning.engine.segments import Segment, cut_segments
from ee_tuning.engine.speculation import EDGES, Speculation
from ee_tuning.engine.speculation_memory import SpeculationMemory

SEGMENTS = cut_segments([(1, 12)], (2, 6))
COSTS = Costs(((1.0, 1.5, 3.0),) * 3, {2: (0.1, 0.2, 0.3), 6: (0.1, 0.2, 0.3)}, (0.2, 0.3, 0.4))
OTHER = Costs(((2.0, 2.5, 4.0),) * 3, {2: (0.1, 0.2, 0.3), 6: (0.1, 0.2, 0.3)}, (0.2, 0.3, 0.4))
KEY = {"heads": "abc", "threads": 2}


def learnt() -> Speculation:
    speculation = Speculation(COSTS, SEGMENTS)
    for place in range(len(EDGES)):
        for _ in range(20):
            speculation.records[2].add(EDGES[place], place > 3)
    speculation.num_rounds = 100
    return speculation


def recalled(path: Path, key: dict[str, object] | None = None, segments: tuple[Segment, ...] = SEGMENTS) -> Speculation:
    speculation = Speculation(OTHER, segments)
    SpeculationMemory(path, KEY if key is None else key).recall(speculation)
    return speculation


def test_what_was_learnt_comes_back(tmp_path: Path) -> None:
    """A short process that measures and explores for most of its life."""
    known = learnt()
    SpeculationMemory(tmp_path / "new" / "kept.json", KEY).keep(known)
    again = recalled(tmp_path / "new" / "kept.json")
    assert again.costs == OTHER and again.records == known.records


def test_little_that_is_new_is_not_written(tmp_path: Path) -> None:
    """A write for every prompt."""
    known, memory = learnt(), SpeculationMemory(tmp_path / "kept.json", KEY)
    memory.keep(known)
    (tmp_path / "kept.json").unlink()
    known.num_rounds += 1
    memory.keep(known)
    assert not (tmp_path / "kept.json").exists()


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "nan": lambda tree: tree["records"]["2"]["seen"].__setitem__(0, None),
    "negative": lambda tree: tree["records"]["2"]["seen"].__setitem__(0, -1),
    "bins": lambda tree: tree["records"]["2"]["seen"].pop(),
    "right": lambda tree: tree["records"]["2"]["right"].__setitem__(0, 1e9),
    "layer": lambda tree: tree["records"].pop("6"),
    "format": lambda tree: tree.update(format=0),
    "key": lambda tree: tree["key"].update(heads="abd"),
    "empty": lambda tree: tree.clear(),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "cut", "binary", "list"])
def test_what_is_damaged_or_foreign_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    """A traceback in the midst of decoding, or plans by another model's figures."""
    path = tmp_path / "kept.json"
    SpeculationMemory(path, KEY).keep(learnt())
    whole = path.read_bytes()
    if damage in DAMAGES:
        DAMAGES[damage](tree := json.loads(whole))
        path.write_text(json.dumps(tree))
    else:
        path.write_bytes({"cut": whole[:40], "binary": b"\xff\x00" * 50, "list": b"[1, 2]"}[damage])
    with caplog.at_level(logging.WARNING):
        again = recalled(path)
    assert again.costs == OTHER and again.num_rounds == 0
    assert (
        f"{path} is not a valid record of speculation and is replaced: " in caplog.text
        and "\n" not in caplog.messages[0]
    )


def test_a_folder_that_can_not_be_written_is_no_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A decoding that fails at its end, its tokens lost, for a cache that is full or read-only."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        SpeculationMemory(tmp_path / "file" / "kept.json", KEY).keep(learnt())
    assert caplog.messages[0].startswith("records of speculation are not saved: ")
