"""The stage of `tools/gpu_check.py` that wants several processes, rehearsed without a GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest
from world import World

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from gpu_stages import shared_gpu
from gpu_stages.bench import Bench


@pytest.mark.parametrize("name", [check.name for check in shared_gpu.CHECKS])
def test_every_check_of_several_processes_runs(world: World, tmp_path: Path, name: str) -> None:
    """Minutes with a GPU that end in a misspelt name."""

    def stages(function: Any, *arguments: Any) -> list[Any]:
        found = world.run(function, *arguments)  # two replicas of two stages
        return [found[0], found[2]]

    bench = Bench("cpu", tmp_path, tmp_path, is_tiny=True, is_inline=True)
    bench.stages = stages
    (check,) = (each for each in shared_gpu.CHECKS if each.name == name)
    assert not [each for each in check.run(bench) if each.is_must and each.is_met is False]
    bench.close()
