"""Decoding with a drafting head under tensor parallelism and over pipeline stages."""

from pathlib import Path

import pytest
from decoding import run_all
from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

SAID = (3, 60, 97)
"""All that the head drafts and the model says, so that drafts are right at times; on two shards of the vocabulary."""
PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]


def drafted_at(model: str, head: str, tp: int, pp: int) -> list[tuple[list[int], int, int]]:
    """Tokens and counts of drafts, made and kept, of each prompt; every third request decodes at full depth."""
    keys = {
        "model.path": model,
        "exits.path": head,
        "model.dtype": "float64",
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
    }
    config = load_config(None, keys)
    loaded = load_for_generation(config, init_parallel(config.parallel))
    params = SamplingParams(max_tokens=16, logit_bias=dict.fromkeys(SAID, 50.0))
    policies = [Policy(has_draft_head=True), Policy(has_draft_head=True, looks_up=True), FULL]
    made = []
    for num_slots in (1, 3):
        engine = Engine(loaded.model, loaded.stages, num_slots=num_slots, max_length=64, prefill_chunk=6)
        for i, prompt in enumerate(2 * PROMPTS):
            made += engine.add_request(prompt, params, policies[i % 3])
        run_all(engine)
    return [(each.output, each.statistics.num_drafted, each.statistics.num_accepted) for each in made]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)
    keys = {"exit_layers": [], "architecture": "eagle3", "aux_layers": [1, 3, 5]}
    return str(folder / "model"), str(write_exits(folder / "model", folder / "head", SAID, **keys))


def test_ranks_draft_the_same(world, subject):
    """A likeliest token of one shard of the list; a layer cut by heads whose parts are not summed; states of another
    step, or of a layer on another stage, that the head reads; ranks that check different drafts, and wait for each
    other for ever.
    """
    wanted = drafted_at(*subject, 1, 1)
    alone = 2 * len(PROMPTS)
    assert 10 < sum(accepted for *_, accepted in wanted[:alone]) < sum(drafted for _, drafted, _ in wanted[:alone])
    for tp, pp in [(2, 1), (1, 2), (2, 2), (1, 4)]:
        answers = world.run(drafted_at, *subject, tp, pp)
        assert all(answer == answers[0] for answer in answers)
        assert [tokens for tokens, *_ in answers[0]] == [tokens for tokens, *_ in wanted]
        assert answers[0][:alone] == wanted[:alone], "in a batch, what decodes side by side depends on the layout"
        assert sum(accepted for *_, accepted in answers[0][alone:]) > 0
