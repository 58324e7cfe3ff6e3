"""Steps, and rounds of drafts of a lone sequence, in one call of the kernels: the same tokens and counts as segment by
segment in Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from decoding import FixedDrafts, policy_for, run_all
from exits import loaded_with, write_exits
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.engine.engine import Engine, TokenStep
from ee_tuning.engine.native_step import NativeStage
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.step_plan import RowOutput, RowPlan
from ee_tuning.kernel import build
from ee_tuning.sampling.params import SamplingParams

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")

PROMPT = [5, 17, 80, 3, 9, 61, 22]
NEW_TOKENS = 44


NATIVE, IN_PYTHON = ("norm", "mlp", "layer", "embedding"), ("linear", "adapter")
"""Architectures whose steps are one call, and others, which take the way segment by segment anyway."""


@pytest.fixture(scope="module", params=[*NATIVE, *IN_PYTHON])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp(request.param)
    random_llama(folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", architecture=request.param, init="copy")
    return loaded_with(folder / "model", exits)


def engine_for(loaded: LoadedModel, **options: Any) -> Engine:
    return Engine(loaded.model, loaded.stages, **{"num_slots": 2, "max_length": 96, "max_pending": 5, **options})


@contextmanager
def in_python() -> Iterator[None]:
    """Segment by segment, by the same kernels."""
    with mock.patch.object(NativeStage, "serves", lambda *_: False):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of drafts of each step that was made in one call."""
    counts: list[int] = []
    run = NativeStage.run

    def noted(self: NativeStage, rows: list[RowPlan], *rest: Any) -> list[RowOutput]:
        outputs = run(self, rows, *rest)
        counts.append(sum(len(output.asked) for output in outputs))
        return outputs

    monkeypatch.setattr(NativeStage, "run", noted)
    return counts


def architecture(loaded: LoadedModel) -> str:
    return loaded.model.plan.exits[0].architecture


def drafted_both_ways(loaded: LoadedModel, thresholds: dict[int, float], ends: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcome for a sequence whose exits draft by `thresholds`, in one call a round and segment by segment."""
    answers = []
    for way in (nullcontext, in_python):
        with way():
            engine = engine_for(loaded)
            known = engine.proposer.speculation = FixedDrafts(engine, thresholds)
            params = SamplingParams(max_tokens=NEW_TOKENS, **ends)
            (sequence,) = engine.add_request(
                PROMPT, params, policy_for(loaded.model, policy="speculative", prompt_lookup=False)
            )
            answers.append({**told(sequence, run_all(engine)), "records": known.records})
    return answers


def told(sequence: Sequence, steps: list[TokenStep]) -> dict[str, Any]:
    counts = {name: count for name, count in vars(sequence.statistics).items() if name.startswith("num_")}
    # Python runs passes of more than 32 tokens by torch, which rounds otherwise.
    own = [(step.token_id, step.exit_layer, round(step.confidence, 5)) for step in steps if step.sequence is sequence]
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
def test_a_step_in_one_call_is_the_step_segment_by_segment(
    loaded: LoadedModel, made: list[int], policy: dict[str, Any]
) -> None:
    """A state that waits in front of the wrong segment, a head that is asked about the wrong token, a rider that is not
    counted.
    """
    answers = []
    for way in (nullcontext, in_python):
        with way():
            engine = engine_for(loaded)
            (sequence,) = engine.add_request(
                PROMPT, SamplingParams(max_tokens=NEW_TOKENS), policy_for(loaded.model, **policy)
            )
            answers.append(told(sequence, run_all(engine)))
    assert answers[0] == answers[1] and len(answers[0]["said"]) == NEW_TOKENS
    is_fully_native = architecture(loaded) in NATIVE and "measure" not in policy
    assert (len(made) > NEW_TOKENS / 2) == (policy.get("policy") == "full" or is_fully_native)


@pytest.mark.parametrize("loaded", NATIVE, indirect=True)
@pytest.mark.parametrize(
    "policy", [{"policy": "full"}, {"policy": "fixed", "exit_layer": 2}, {"threshold": 0.5}, {"threshold": [0.3, 1.5]}]
)
def test_a_batch_in_one_call_is_the_batch_segment_by_segment(
    loaded: LoadedModel, made: list[int], policy: dict[str, Any]
) -> None:
    """A sequence that gets its neighbour's states or answer, or leaves because it did; states of those that ride along
    lost on the way.
    """
    answers, same = [], policy_for(loaded.model, **policy)
    for way in (nullcontext, in_python):
        with way():
            engine = engine_for(loaded, num_slots=4)
            added = [
                engine.add_request(PROMPT[i:] * (i + 1), SamplingParams(max_tokens=NEW_TOKENS - 7 * i), same)[0]
                for i in range(4)
            ]
            steps = run_all(engine)
            answers.append([told(sequence, steps) for sequence in added])
    assert answers[0] == answers[1]
    assert made


@pytest.mark.parametrize("loaded", NATIVE, indirect=True)
def test_a_mixture_in_one_call_is_the_mixture_segment_by_segment(loaded: LoadedModel, made: list[int]) -> None:
    """Thresholds of one row applied to another; a draft that rides to the deep layers with its neighbours; tokens drawn
    from another row's logits.
    """
    policies = [{"policy": "full"}, {"policy": "fixed", "exit_layer": 2}, {"threshold": 0.5}, {"policy": "speculative"}]
    answers = []
    for way in (nullcontext, in_python):
        with way():
            engine = engine_for(loaded, num_slots=8)
            engine.proposer.speculation = FixedDrafts(engine, {2: 0.6})
            added = [
                engine.add_request(
                    [*PROMPT[place:], place],
                    SamplingParams(max_tokens=NEW_TOKENS - 3 * place, temperature=0.8 * (place % 2), min_tokens=place),
                    policy_for(loaded.model, **policies[place // 2]),
                )[0]
                for place in range(8)
            ]
            steps = run_all(engine)
            answers.append([told(sequence, steps) for sequence in added])
    assert answers[0] == answers[1]
    assert made


@pytest.mark.parametrize("loaded", NATIVE, indirect=True)
def test_company_that_comes_and_goes(loaded: LoadedModel) -> None:
    """States that one way of stepping leaves behind and the other one does not find."""
    answers = []
    for way in (nullcontext, in_python):
        engine, steps = engine_for(loaded), list[TokenStep]()
        (first,) = engine.add_request(
            PROMPT, SamplingParams(max_tokens=NEW_TOKENS), policy_for(loaded.model, threshold=0.5)
        )
        for number in range(40):  # from one way to the other and back
            with way() if number % 7 < 3 else nullcontext():
                steps += engine.step()
            if number == 9:
                (second,) = engine.add_request(
                    PROMPT[::-1], SamplingParams(max_tokens=12), policy_for(loaded.model, threshold=0.3)
                )
        steps += run_all(engine)
        answers.append([told(first, steps)["said"], told(second, steps)["said"]])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("loaded", NATIVE, indirect=True)
@pytest.mark.parametrize("plan", [{2: 0.0}, {4: 0.0}, {2: 0.6, 4: 0.3}, {2: 0.9}, {}])
@pytest.mark.parametrize("ends", [{}, {"stop_token_ids": tuple(range(0, 101, 3)), "min_tokens": 20}])
def test_drafts_in_one_call_are_the_drafts_one_by_one(
    loaded: LoadedModel, made: list[int], plan: dict[int, float], ends: dict[str, Any]
) -> None:
    """A draft behind an end or beyond what there is room for, one more or less than the odds allow, a lesson that is
    not learnt.
    """
    answers = drafted_both_ways(loaded, plan, ends)
    assert answers[0] == answers[1]
    assert (answers[0]["num_drafted"] > 0) == bool(plan)
    if not ends:  # else a draft mostly ends it
        assert (max(made, default=0) > 1) == bool(plan)


@pytest.fixture(scope="module")
def own_layer(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("own_layer")
    random_llama(folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", architecture="layer", init="copy", exit_layers=[2])
    return loaded_with(folder / "model", exits)


@pytest.mark.parametrize("plan", [{2: 0.0}, {2: 0.6}, {2: 0.95}, {}])
def test_a_head_with_a_layer_of_its_own_drafts_in_one_call(
    own_layer: LoadedModel, made: list[int], plan: dict[int, float]
) -> None:
    """Keys and values that the head's layer lacks, or has of a draft that was rejected."""
    answers = drafted_both_ways(own_layer, plan, {})
    assert answers[0] == answers[1]
    assert made and (not plan or 0 < answers[0]["num_accepted"] < answers[0]["num_drafted"])
