"""Decoding with caches, pending tokens and batches says what transformers says when every token is read again at every
step.

In float64, where random models have no ties between tokens.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import decode, policy_for, run_all
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.engine.engine import Engine
from ee_tuning.sampling.params import SamplingParams

NEW_TOKENS = 24
PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64], [99, 1, 0]]
HEADS = {
    "embedding": {"architecture": "embedding"},
    "norm untied": {"architecture": "norm"},
    "mlp untied": {"architecture": "mlp"},
    "layer, linear": {"architecture": "layer,linear"},
    "adapter tied": {"architecture": "adapter", "output": "tied"},
    "layer, mlp": {"architecture": "layer,mlp"},
    "adapter, layer": {"architecture": ["adapter", "layer"]},
    "norm tied": {"architecture": "norm", "output": "tied"},
    "mlp tied": {"architecture": "mlp", "output": "tied"},
}


@dataclass
class Subject:
    """A model with exits, and the plain decoder of the same."""

    loaded: LoadedModel
    plain: PlainDecoder

    def decode(self, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """(tokens, exit layers) of each prompt, decoded as one batch."""
        return [(said.tokens, said.exit_layers) for said in decode(self.loaded, prompts, NEW_TOKENS, **options)]

    def engine(self, **options: Any) -> Engine:
        return Engine(self.loaded.model, self.loaded.stages, **{"num_slots": 1, "max_length": 64, **options})


def subject(folder: Path, heads: dict[str, str]) -> Subject:
    reference = random_llama(folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", **heads)
    loaded = loaded_with(folder / "model", exits, dtype="float64")
    return Subject(loaded, PlainDecoder(reference, exits, (2, 4), torch.float64))


@pytest.fixture(scope="module", params=HEADS)
def each_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("subject"), HEADS[request.param])


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(tmp_path_factory.mktemp("mlp"), HEADS["mlp untied"])


@pytest.mark.parametrize("threshold", [0.9, 0.6, 0.3])
def test_tokens_and_exit_layers_equal_the_plain_decoder(each_kind, threshold):
    """A cache that lacks a skipped token, a head fed the wrong states, an exit taken out of turn."""
    wanted = [each_kind.plain.decode(prompt, NEW_TOKENS, threshold) for prompt in PROMPTS]
    left = {layer for _, layers in wanted for layer in layers}
    assert len(left) > 1, "the claim is empty where every token leaves at the same place"
    assert [each_kind.decode([prompt], threshold=threshold)[0] for prompt in PROMPTS] == wanted


@pytest.mark.parametrize("max_pending", [1, 3, 16])
def test_batch_equals_one_at_a_time_however_many_tokens_may_wait(mlp, max_pending):
    """A row made to exit by its neighbour; a padded row that sees another's keys; a catch-up that drops or doubles a
    token.
    """
    wanted = [mlp.plain.decode(prompt, NEW_TOKENS, 0.5) for prompt in PROMPTS]
    assert mlp.decode(PROMPTS, threshold=0.5, engine={"max_pending": max_pending}) == wanted


def test_threshold_above_one_equals_the_full_model(mlp):
    """A head consulted at confidence 1.0 would change greedy output."""
    full = mlp.decode(PROMPTS, policy="full")
    assert mlp.decode(PROMPTS, threshold=1.1) == full
    assert full == [mlp.plain.decode(prompt, NEW_TOKENS, 2.0) for prompt in PROMPTS]


def test_the_full_model_is_asked_after_every_prefix(mlp):
    """Agreement with the full model is measured by this: no answer after a prefix of the prompt is no agreement
    anywhere.
    """
    model = mlp.loaded.model
    engine = Engine(model, mlp.loaded.stages, num_slots=1, max_length=64)
    assert engine.full_model_tokens(PROMPTS[2]) == mlp.plain.logits(PROMPTS[2])[6].argmax(-1).tolist()


def test_fixed_exit_reads_the_prompt_no_deeper(mlp):
    """The first token from the final head, or deeper layers that run for nothing."""
    got = mlp.decode(PROMPTS, policy="fixed", exit_layer=4)
    for prompt, (tokens, left) in zip(PROMPTS, got, strict=True):
        assert left == [4] * NEW_TOKENS
        said = mlp.plain.logits(prompt + tokens[:-1])[4].argmax(-1).tolist()
        assert tokens == said[len(prompt) - 1 :]


def test_caches_after_catch_up_equal_a_full_pass(mlp):
    """Keys of a token that left early computed from the wrong states, or left out."""
    engine, fresh = mlp.engine(max_pending=4), mlp.engine()
    (sequence,) = engine.add_request(
        PROMPTS[0], SamplingParams(max_tokens=60), policy_for(mlp.loaded.model, threshold=0.3)
    )
    while not (len(sequence.tokens) > 20 and sequence.num_computed[-1] == len(sequence.tokens) - 1):
        engine.step()
        assert len(sequence.tokens) < 60, "the deep layers never caught up"
    fresh.full_model_tokens(sequence.tokens[:-1])
    n = len(sequence.tokens) - 1
    for layer in range(1, 7):
        for name in ("keys", "values"):
            mine, theirs = (getattr(e.cache.layer(layer), name)[:n] for e in (engine, fresh))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_the_cache_of_a_layer_head_has_no_holes(tmp_path):
    """Keys that a `layer` head makes only for tokens it is asked about: those that left before it would be missing."""
    own = subject(tmp_path, {"architecture": "norm,layer"})
    engine, fresh, steps = own.engine(max_pending=4), own.engine(), []
    (sequence,) = engine.add_request(
        PROMPTS[0], SamplingParams(max_tokens=60), policy_for(own.loaded.model, threshold=0.4)
    )
    while len(sequence.tokens) < 40 or sequence.num_pending(1):  # nothing waits before layer 3
        steps += engine.step()
        assert len(sequence.tokens) < 60, "the deep layers never caught up"
    assert {2, 4} <= {step.exit_layer for step in steps}
    n = sequence.num_own_computed[1]
    assert n > 20
    fresh.add_request(
        sequence.tokens[:n], SamplingParams(max_tokens=1), policy_for(own.loaded.model, policy="fixed", exit_layer=4)
    )
    run_all(fresh)
    for name in ("keys", "values"):
        mine, theirs = (getattr(e.cache.exit_head(4), name)[:n] for e in (engine, fresh))
        assert theirs.any(dim=2).any(dim=1).all()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_sequence_that_joins_late_is_not_disturbed(mlp):
    """A new prompt read among running ones must fill its own cache and leave theirs."""
    engine, policy = mlp.engine(num_slots=2), policy_for(mlp.loaded.model, threshold=0.5)
    (first,) = engine.add_request(PROMPTS[0], SamplingParams(max_tokens=NEW_TOKENS), policy)
    for _ in range(5):
        engine.step()
    (second,) = engine.add_request(PROMPTS[2], SamplingParams(max_tokens=NEW_TOKENS), policy)
    run_all(engine)
    for sequence, prompt in ((first, PROMPTS[0]), (second, PROMPTS[2])):
        assert sequence.output == mlp.plain.decode(prompt, NEW_TOKENS, 0.5)[0]


def test_sampling_draws_the_same_in_any_batch(mlp):
    """Draws taken from one generator for all rows depend on the neighbours."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=1.3, top_k=20, top_p=0.95, seed=11)
    together = mlp.decode(PROMPTS, params=params, threshold=0.5)
    assert together == [mlp.decode([prompt], params=params, threshold=0.5)[0] for prompt in PROMPTS]
    other = mlp.decode(PROMPTS, params=replace(params, seed=12), threshold=0.5)
    assert other != together
