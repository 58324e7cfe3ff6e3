"""Heads with a layer of their own: what they cost those who ask them, and those who do not. In float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import FixedDrafts, decode, policy_for, run_all
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.native_step import NativeStage
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL

PROMPTS = [[5, 17, 80, 3, 9], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, PlainDecoder]:
    """A `norm` head at layer 2 and a `layer` head at 4, of 6."""
    folder: Path = tmp_path_factory.mktemp("own")
    reference = random_llama(folder / "model", confident=True)
    exits = write_exits(
        folder / "model", folder / "exits", architecture="norm,layer", init="copy"
    )  # so that some drafts are right
    return loaded_with(folder / "model", exits, dtype="float64"), PlainDecoder(reference, exits, (2, 4), torch.float64)


def counted(engine: Engine) -> list[int]:
    """Tokens of each pass through the own layer of the head at layer 4, from now on, in the loop that Python runs."""
    seen: list[int] = []
    own_layer_of = engine.stage.own_layer_of

    def watched(number: int) -> Callable[..., Any]:
        def run(hidden: torch.Tensor, *rest: Any) -> Any:
            seen.append(len(hidden))
            return own_layer_of(number)(hidden, *rest)

        return run

    engine.stage.own_layer_of = watched  # type: ignore[assignment, method-assign]
    return seen


def test_requests_that_do_not_ask_a_head_pay_nothing(
    own: tuple[LoadedModel, PlainDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's layer run over the tokens of requests that never ask it, its states kept for them, or its answers mixed
    up beside them.
    """
    monkeypatch.setattr(NativeStage, "serves", lambda *_: False)
    loaded, plain = own
    engine = Engine(loaded.model, loaded.stages, num_slots=2, max_length=64)
    passes = counted(engine)
    params, asking = SamplingParams(max_tokens=NEW_TOKENS), policy_for(loaded.model, threshold=0.5)
    for policy in (FULL, policy_for(loaded.model, policy="fixed", exit_layer=2)):
        engine.add_request(PROMPTS[0], params, policy)
        run_all(engine)
    assert not passes
    (silent,) = engine.add_request(PROMPTS[0], params, FULL)
    (asked,) = engine.add_request(PROMPTS[1], params, asking)
    run_all(engine)
    assert asked.output == plain.decode(PROMPTS[1], NEW_TOKENS, 0.5)[0]
    assert silent.output == plain.decode(PROMPTS[0], NEW_TOKENS, 1.1)[0]
    # Each of its tokens once at most; the prompt's and those that left before it with the first one asked behind them.
    assert 0 < sum(passes) <= len(PROMPTS[1]) + NEW_TOKENS - 1
    assert silent.own_layers == ()


@pytest.mark.parametrize("most", [1, 3])
def test_states_do_not_pile_up_at_a_head_that_is_seldom_asked(own: tuple[LoadedModel, PlainDecoder], most: int) -> None:
    """States kept for ever; or the newest token's state used up by the time its head is asked."""
    loaded, plain = own
    for prompt in PROMPTS:
        (said,) = decode(loaded, [prompt], NEW_TOKENS, threshold=0.4, engine={"max_pending": most})
        assert (said.tokens, said.exit_layers) == plain.decode(prompt, NEW_TOKENS, 0.4)
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=64, max_pending=most)
    policy = policy_for(loaded.model, threshold=(0.0, 0.9))  # all but the first token leave at layer 2
    (sequence,) = engine.add_request(PROMPTS[0], SamplingParams(max_tokens=40), policy)
    while not engine.is_idle:
        engine.step()
        assert sequence.num_computed[1] - sequence.num_own_computed[1] <= most
    assert sequence.num_own_computed[1] > 20


def test_rejected_drafts_leave_the_cache_of_a_head(own: tuple[LoadedModel, PlainDecoder]) -> None:
    """States of drafts that were wrong, kept at a head: its next answers would come from tokens that are not there."""
    loaded, plain = own
    engine, fresh = (Engine(loaded.model, loaded.stages, num_slots=1, max_length=64) for _ in range(2))
    engine.proposer.speculation = FixedDrafts(engine, {4: 0.0})
    (sequence,) = engine.add_request(
        PROMPTS[1], SamplingParams(max_tokens=40), policy_for(loaded.model, policy="speculative")
    )
    while sequence.num_output < 30 or sequence.num_drafts:
        engine.step()
    assert sequence.output == plain.decode(PROMPTS[1], 40, 1.1)[0][: sequence.num_output]
    assert sequence.statistics.num_drafted > sequence.statistics.num_accepted > 0
    n = sequence.num_own_computed[1]
    assert n > 30
    fresh.add_request(
        sequence.tokens[:n], SamplingParams(max_tokens=1), policy_for(loaded.model, policy="fixed", exit_layer=4)
    )
    run_all(fresh)
    for name in ("keys", "values"):
        mine, theirs = (getattr(e.cache.exit_head(4), name)[:n] for e in (engine, fresh))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
