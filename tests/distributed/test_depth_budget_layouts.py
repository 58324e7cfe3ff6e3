"""The exit that a budget chooses is one for all ranks, whatever each of them measures."""

from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.generation.depth_budget import measure_depths
from ee_tuning.parallel.topology import init_parallel


def times_at(model: str, exits: str, tp: int, pp: int) -> tuple[float, dict[int, float]]:
    """The measured times of this rank."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(load_config(None, {"model.path": model, "exits.path": exits}), topology)
    times = measure_depths(loaded.model, loaded.stages)
    return times.full, times.exits


def test_all_ranks_have_the_same_times(world, tmp_path):
    """Ranks that time for themselves, choose two exits, and wait for each other for ever."""
    random_llama(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", exit_layers=(2, 4), architecture=["norm"])
    first, *others = world.run(times_at, str(tmp_path / "model"), str(exits), 2, 2)
    assert list(first[1]) == [2, 4] and first[0] > 0 and others == [first] * 3
