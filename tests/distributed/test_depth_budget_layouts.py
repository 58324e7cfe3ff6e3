"""The exit that a budget chooses is one for all ranks, whatever each of them measures."""

from unittest.mock import patch

from byte_tokenizer import VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.generation import depth_budget
from ee_tuning.generation.budget_exit import BudgetExit
from ee_tuning.generation.depth_budget import measure_depths
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel


def times_at(model: str, exits: str, tp: int, pp: int) -> tuple[float, dict[int, float]]:
    """The measured times of this rank."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(load_config(None, {"model.path": model, "exits.path": exits}), topology)
    times = measure_depths(loaded.model, loaded.stages)
    return times.full, times.exits


def kept_at(model: str, exits: str, tp: int, pp: int) -> tuple[int | None, BudgetExit | None]:
    """The exit of the budget 0.5 on this rank, where an output began with exit 2. Nothing may be timed."""
    overrides = {
        "model.path": model,
        "exits.path": exits,
        "generation.budget": 0.5,
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
    }
    with patch.object(depth_budget, "measure_depths", side_effect=AssertionError("measured anew")):
        llm = EarlyExitLLM.from_config(load_config(None, overrides), budget_exit=BudgetExit(0.5, 2))
    return llm.defaults.exit_layer, llm.budget_exit


def test_all_ranks_keep_the_exit_with_which_an_output_began(world, tmp_path):
    """Ranks that time depths although the choice is made, or of which one alone has it: two exits at once."""
    random_llama(tmp_path / "model", vocab_size=VOCABULARY)
    write_byte_tokenizer(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", exit_layers=(2, 4), architecture=["norm"])
    assert world.run(kept_at, str(tmp_path / "model"), str(exits), 2, 2) == [(2, (0.5, 2))] * 4


def test_all_ranks_have_the_same_times(world, tmp_path):
    """Ranks that time for themselves, choose two exits, and wait for each other for ever."""
    random_llama(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", exit_layers=(2, 4), architecture=["norm"])
    first, *others = world.run(times_at, str(tmp_path / "model"), str(exits), 2, 2)
    assert list(first[1]) == [2, 4] and first[0] > 0 and others == [first] * 3
