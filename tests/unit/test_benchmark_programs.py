"""The programs in benchmarks/ are run by hand, months apart."""

import importlib.util
from pathlib import Path

import pytest
from exits import loaded_with, write_exits
from random_models import random_llama

from ee_tuning.engine.engine import Engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A function that was renamed, and a benchmark that nobody can run when its figure is doubted."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_measured_costs_are_seconds_that_never_fall_with_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A probe of layers, heads or caches as they were, which ends the benchmark of shortlists after its minutes of
    fitting.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    random_llama(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", exit_layers=[1, 2], architecture=["mlp", "layer"])
    loaded = loaded_with(tmp_path / "model", exits)
    stage = Engine(loaded.model, loaded.stages, num_slots=1, max_length=32).stage
    costs = importlib.import_module("measured_costs").measure_costs(stage)
    assert len(costs.segments) == 3 and costs.heads.keys() == {1, 2}
    for curve in (*costs.segments, *costs.heads.values(), costs.final_head):
        assert min(curve) > 0 and sorted(curve) == list(curve)
