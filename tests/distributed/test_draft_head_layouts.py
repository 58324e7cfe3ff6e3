"""Decoding with a drafting head under tensor parallelism; more than one pipeline stage is refused."""

from pathlib import Path

import pytest
from decoding import run_all
from exits import write_exits
from random_models import random_llama

from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.params import SamplingParams
from ee_tuning.engine.policy import Policy
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import init_parallel

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]


def drafted_at(model: str, head: str, tp: int, pp: int) -> list[tuple[list[int], int, int]] | str:
    """Tokens and counts of drafts, made and kept, of each prompt; or the refusal."""
    keys = {
        "model.path": model,
        "exits.path": head,
        "model.dtype": "float64",
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
    }
    config = load_config(None, keys)
    try:
        loaded = load_for_generation(config, init_parallel(config.parallel))
    except InputError as error:
        return str(error)
    engine = Engine(loaded.model, loaded.stages, num_slots=3, max_length=64, prefill_chunk=6)
    made = [engine.add_request(p, SamplingParams(max_tokens=30), Policy(has_draft_head=True))[0] for p in PROMPTS]
    run_all(engine)
    return [(each.output, each.statistics.num_drafted, each.statistics.num_accepted) for each in made]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)
    listed = tuple(range(0, 101, 2))
    keys = {"exit_layers": [], "architecture": "eagle3", "aux_layers": [1, 3, 5]}
    return str(folder / "model"), str(write_exits(folder / "model", folder / "head", listed, **keys))


def test_ranks_draft_the_same(world, subject):
    """A likeliest token of one shard of the list; a layer cut by heads whose parts are not summed; ranks that check
    different drafts, and wait for each other for ever.
    """
    wanted = drafted_at(*subject, 1, 1)
    assert sum(drafted for _, drafted, _ in wanted) > 5
    assert all(answer == wanted for answer in world.run(drafted_at, *subject, 2, 1))


def test_stages_are_refused(world, subject):
    """States of layers on another stage, which nothing sends in decoding."""
    for answer in world.run(drafted_at, *subject, 1, 2):
        assert "one pipeline stage only, got --pipeline-model-parallel-size 2" in answer
