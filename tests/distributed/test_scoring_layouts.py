"""Every layout TP × PP gives continuations the log-probabilities that one process gives them."""

import pytest
from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.generation.scoring import Score, score, score_by
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.policy import policy_of

PAIRS = [
    ([5, 17, 80, 3, 9], [41, 6, 7]),
    ([41], [2]),
    ([41], [100]),
    ([7, 7, 7, 90, 12, 60], [33, 2, 51, 18, 64, 9, 12]),
    ([99], [0] * 4),
]
POLICIES = (
    {"policy": "full"},
    {"policy": "fixed", "exit_layer": 2},
    {"policy": "fixed", "exit_layer": 4},
    {"threshold": 0.6},
    {"threshold": "0.5,0.3", "measure": "margin"},
    {"threshold": 0.7, "measure": "entropy"},
)


Told = tuple[list[float], list[bool], list[int], list[list[tuple[int, float]]]]


def told(each: Score) -> Told:
    """The log-probabilities, which tokens were the likeliest, the exits, and the likeliest tokens."""
    top = [[(token, round(value, 8)) for token, value in one.items()] for one in each.top_logprobs]
    return [round(value, 8) for value in each.logprobs], each.is_greedy, each.exit_layers, top


def scores_at(model: str, exits: str, tp: int, pp: int) -> list[list[Told]]:
    """Per policy (each alone, then all from one pass, with the likeliest tokens) and pair what is told."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(
        load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology
    )
    policies = [
        policy_of(
            load_config(None, {f"generation.{key}": value for key, value in keys.items()}).generation,
            loaded.model.plan.exit_layers,
            loaded.model.config.num_layers,
        )
        for keys in POLICIES
    ]
    alone = [score(loaded.model, PAIRS, policy, max_rows=2) for policy in policies]
    return [
        [told(each) for each in scores]
        for scores in (*alone, *score_by(loaded.model, PAIRS, policies, max_rows=2, num_top=3))
    ]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)  # 101 tokens: every TP pads the vocabulary
    return str(folder / "model"), str(write_exits(folder / "model", folder / "exits"))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_layouts_score_the_same(world, subject, tp, pp):
    """A label on another shard, a stage that asks about positions that left before it, an answer added up twice."""
    wanted = scores_at(*subject, 1, 1)
    assert {layer for _, _, left, _ in wanted[3] for layer in left} == {2, 4, 6}
    for answer in world.run(scores_at, *subject, tp, pp):
        assert answer == wanted
