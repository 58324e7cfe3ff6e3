"""Whole steps, and rounds of drafts of a lone sequence, in one call of the kernels: the same is said and counted as
piece by piece.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import policy_for, run_all
from exits import write_exits
from random_models import random_llama

from ee_tuning.checkpoint.load import LoadedModel, load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.generation.costs import Costs
from ee_tuning.generation.engine import Engine, TokenStep
from ee_tuning.generation.params import SamplingParams
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.speculation import Speculation
from ee_tuning.kernel import build, calls
from ee_tuning.parallel.topology import init_parallel

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")

PROMPT = [5, 17, 80, 3, 9, 61, 22]
NEW_TOKENS = 44


@pytest.fixture(scope="module", params=["norm", "linear", "mlp", "layer", "adapter", "embedding"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp(request.param)
    random_llama(folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", architecture=request.param, init="copy")
    config = load_config(None, {"model.path": str(folder / "model"), "exits.path": str(exits)})
    return load_for_generation(config, init_parallel(ParallelSection()))


def engine_for(loaded: LoadedModel, *, at_once: bool, **options: Any) -> Engine:
    engine = Engine(loaded.model, loaded.stages, **{"num_slots": 2, "max_length": 96, "max_pending": 5, **options})
    if not at_once:
        engine.whole_steps.is_able = engine.drafting.lone_rounds.is_able = False
    return engine


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called for a whole step, or for a round of drafts."""
    names: list[str] = []
    function = calls._function

    def noted(name: str, dtype: torch.dtype) -> Any:
        names.extend({name} & {"run_step", "run_round"})
        return function(name, dtype)

    monkeypatch.setattr(calls, "_function", noted)
    return names


def architecture(loaded: LoadedModel) -> str:
    return loaded.model.plan.exits[0].architecture


def drafted_both_ways(loaded: LoadedModel, plan: dict[int, float], ends: dict[str, Any]) -> list[dict[str, Any]]:
    """What is told of a sequence whose exits draft by `plan`, in one call a round and piece by piece."""
    answers, exits = [], loaded.model.plan.exit_layers
    for at_once in (True, False):
        engine = engine_for(loaded, at_once=at_once)
        free, dear = (1e-9,) * 3, (1.0,) * 3
        costs = Costs((*(free for _ in exits), dear), dict.fromkeys(exits, free), free)
        known = engine.drafting.speculation = Speculation(costs, engine.pieces)
        known._plans[exits], known._next_plan, known._planned_rows, known._survey_end = (plan, 0.4), 10**9, 1, -1
        params = SamplingParams(max_tokens=NEW_TOKENS, **ends)
        (sequence,) = engine.add_request(PROMPT, params, policy_for(loaded.model, policy="speculative"))
        answers.append({**told(sequence, run_all(engine)), "records": known.records})
    return answers


def told(sequence: Sequence, steps: list[TokenStep]) -> dict[str, Any]:
    counts = {name: count for name, count in vars(sequence.statistics).items() if name.startswith("num_")}
    own = [(step.token_id, step.exit_layer, step.confidence) for step in steps if step.sequence is sequence]
    return {"said": own, "reason": sequence.finish_reason, **counts}


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "full"},
        {"policy": "fixed", "exit_layer": 2},
        {"policy": "fixed", "exit_layer": 4},
        {"threshold": 0.5},
        {"threshold": 0.0},
        {"threshold": [0.3, 1.5]},
        {"threshold": 0.4, "measure": "margin"},
    ],
)
def test_a_step_in_one_call_is_the_step_piece_by_piece(
    loaded: LoadedModel, made: list[str], policy: dict[str, Any]
) -> None:
    """A state that waits in front of the wrong piece, a head that is asked about the wrong token, a rider that is not
    counted.
    """
    answers = []
    for at_once in (True, False):
        engine = engine_for(loaded, at_once=at_once)
        (sequence,) = engine.add_request(
            PROMPT, SamplingParams(max_tokens=NEW_TOKENS), policy_for(loaded.model, **policy)
        )
        answers.append(told(sequence, run_all(engine)))
    assert answers[0] == answers[1] and len(answers[0]["said"]) == NEW_TOKENS
    is_known = policy.get("policy") == "full" or (
        architecture(loaded) not in ("layer", "adapter", "linear") and "measure" not in policy
    )
    assert ("run_step" in made) == is_known


@pytest.mark.parametrize(
    "policy", [{"policy": "full"}, {"policy": "fixed", "exit_layer": 2}, {"threshold": 0.5}, {"threshold": [0.3, 1.5]}]
)
def test_a_batch_in_one_call_is_the_batch_piece_by_piece(
    loaded: LoadedModel, made: list[str], policy: dict[str, Any]
) -> None:
    """A sequence that gets its neighbour's states or answer, or leaves because it did; states of those that ride along
    lost on the way.
    """
    answers, same = [], policy_for(loaded.model, **policy)
    for at_once in (True, False):
        engine = engine_for(loaded, at_once=at_once, num_slots=4)
        added = [
            engine.add_request(PROMPT[i:] * (i + 1), SamplingParams(max_tokens=NEW_TOKENS - 7 * i), same)[0]
            for i in range(4)
        ]
        steps = run_all(engine)
        answers.append([told(sequence, steps) for sequence in added])
    assert answers[0] == answers[1]
    assert ("run_step" in made) == (
        policy.get("policy") == "full" or architecture(loaded) not in ("layer", "adapter", "linear")
    )


def test_company_that_comes_and_goes(loaded: LoadedModel) -> None:
    """States that one way of stepping leaves behind and the other one does not find."""
    answers = []
    for at_once in (True, False):
        engine, steps = engine_for(loaded, at_once=at_once), list[TokenStep]()
        (first,) = engine.add_request(
            PROMPT, SamplingParams(max_tokens=NEW_TOKENS), policy_for(loaded.model, threshold=0.5)
        )
        for _ in range(9):
            steps += engine.step()
        (second,) = engine.add_request(
            PROMPT[::-1], SamplingParams(max_tokens=12), policy_for(loaded.model, threshold=0.3)
        )
        steps += run_all(engine)
        answers.append([told(first, steps)["said"], told(second, steps)["said"]])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("plan", [{2: 0.0}, {4: 0.0}, {2: 0.6, 4: 0.3}, {2: 0.9}, {}])
@pytest.mark.parametrize("ends", [{}, {"stop_token_ids": tuple(range(0, 101, 3)), "min_tokens": 20}])
def test_drafts_in_one_call_are_the_drafts_one_by_one(
    loaded: LoadedModel, made: list[str], plan: dict[int, float], ends: dict[str, Any]
) -> None:
    """A draft behind an end or beyond what there is room for, one more or less than the odds allow, a lesson that is
    not learnt.
    """
    answers = drafted_both_ways(loaded, plan, ends)
    assert answers[0] == answers[1]
    # Two heads with layers of their own wait for states.
    is_known = len(plan) < 2 and architecture(loaded) not in ("layer", "adapter", "linear")
    assert (answers[0]["num_drafted"] > 0) == bool(plan) and ("run_round" in made) == is_known


@pytest.mark.parametrize("plan", [{2: 0.0}, {2: 0.6}, {2: 0.95}, {}])
def test_a_head_with_a_layer_of_its_own_drafts_in_one_call(
    tmp_path: Path, made: list[str], plan: dict[int, float]
) -> None:
    """Keys and values that the head's layer lacks, or has of a draft that was rejected."""
    random_llama(tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="layer", init="copy", exit_layers=[2])
    config = load_config(None, {"model.path": str(tmp_path / "model"), "exits.path": str(exits)})
    answers = drafted_both_ways(load_for_generation(config, init_parallel(ParallelSection())), plan, {})
    assert answers[0] == answers[1]
    assert "run_round" in made and (not plan or 0 < answers[0]["num_accepted"] < answers[0]["num_drafted"])
