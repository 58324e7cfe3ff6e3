"""Decoding by graphs, as on a GPU, says what decoding without them says; without a GPU (recorded.py)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from decoding import policy_for, run_all
from exits import loaded_with, write_exits
from mixtures import Subject, mixture
from random_models import random_model
from recorded import ImitatedGraph, imitate_flash_attention, record_on_cpu

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.engine.cost_model import Costs
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.speculation import Speculation
from ee_tuning.kernel import calls
from ee_tuning.sampling.params import SamplingParams

NEW_TOKENS = 18
BEGINNING = [(7 * i + 3) % 101 for i in range(20)]
PROMPTS = [[5, 17, 80, 3, 9], [*BEGINNING, 41], [*BEGINNING, 7, 90, 12]]
"""Two of them share a block of the cache."""
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "fixed": {"policy": "fixed", "exit_layer": 4},
    "threshold": {"threshold": 0.5},
    "two thresholds": {"threshold": [0.3, 0.6]},
    "entropy": {"threshold": 0.4, "measure": "entropy"},
    "speculative": {"policy": "speculative"},
}
HEADS = {"norm": ("llama", "norm"), "mlp": ("llama", "mlp"), "layer": ("llama", "layer"), "gpt2": ("gpt2", "mlp")}


@pytest.fixture(scope="module", params=HEADS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("loaded")
    family, architecture = HEADS[request.param]
    random_model(family, folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", architecture=architecture, init="copy")
    return loaded_with(folder / "model", exits, dtype="float64")


def said(
    loaded: LoadedModel,
    prompts: list[list[int]],
    policy: dict[str, Any],
    params: SamplingParams | None = None,
    **options: Any,
) -> list[list[tuple[int, int, float]]]:
    """(token, exit layer, confidence) of each prompt's tokens, the prompts given twice to one engine."""
    params = params or SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    engine = Engine(
        loaded.model,
        loaded.stages,
        **{"num_slots": len(prompts), "max_length": 80, "max_pending": 3, "prefill_chunk": 6, **options},
    )
    costs = Costs(
        tuple((1.0,) * 3 for _ in engine.segments),
        dict.fromkeys(loaded.model.plan.exit_layers, (0.01,) * 3),
        (0.01,) * 3,
    )
    engine.proposer.speculation = Speculation(costs, engine.segments)  # measured ones would draft otherwise each time
    answers = []
    for _ in range(2):
        sequences = [engine.add_request(prompt, params, policy_for(loaded.model, **policy))[0] for prompt in prompts]
        steps = run_all(engine)
        answers += [
            [(s.token_id, s.exit_layer, round(s.confidence, 9)) for s in steps if s.sequence is each]
            for each in sequences
        ]
    return answers


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_is_said_with_graphs(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, policy: str, batch: int
) -> None:
    """A state that waits and is overwritten, a pass that is told to one segment and not to the next, an answer of
    another pass.
    """
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    prompts = PROMPTS[1:2] if batch == 1 else PROMPTS
    plain = said(loaded, prompts, POLICIES[policy])
    record_on_cpu(monkeypatch)
    assert said(loaded, prompts, POLICIES[policy]) == plain
    assert ImitatedGraph.num_replays > 2 * NEW_TOKENS
    if "threshold" in POLICIES[policy]:
        assert len({layer for each in plain for _, layer, _ in each}) > 1, (
            "the claim is empty where all leave at one place"
        )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("options", [{}, {"cache_tokens": 112}, {"reuses_prefixes": False, "max_pending": 16}])
def test_the_same_is_said_by_every_way_to_attend(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, version: int, options: dict[str, Any]
) -> None:
    """A sequence whose blocks lie apart for want of room, read on from its first one."""
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    plain = said(loaded, PROMPTS, POLICIES["threshold"], **options)
    record_on_cpu(monkeypatch)
    imitate_flash_attention(monkeypatch, version=version)
    assert said(loaded, PROMPTS, POLICIES["threshold"], **options) == plain


def test_sampling_draws_the_same_with_graphs(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of another token under the processors."""
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=1.2, top_p=0.9, repetition_penalty=1.2, seed=3, ignore_eos=True
    )
    plain = said(loaded, PROMPTS, POLICIES["threshold"], params)
    record_on_cpu(monkeypatch)
    assert said(loaded, PROMPTS, POLICIES["threshold"], params) == plain


def test_mixtures_of_requests_by_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no single case has together: sequences that come, go, share and lose blocks, while passes change their shape
    at every step.
    """
    record_on_cpu(monkeypatch)
    subject, seen = Subject(tmp_path), Counter[str]()
    for seed in range(12):
        with monkeypatch.context() as patch:
            if seed % 3:
                imitate_flash_attention(patch, version=1 + seed % 3)
            seen += mixture(subject, seed)
    assert seen["requests"] > 40 and seen["scattered"] > 10 and seen["reused"] > 100


def test_the_spare_block_is_counted_and_lent_to_nobody(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that writes into a sequence's block, or memory that a report does not know of."""
    plain = Engine(loaded.model, loaded.stages, num_slots=2, max_length=80).cache
    record_on_cpu(monkeypatch)
    engine = Engine(loaded.model, loaded.stages, num_slots=2, max_length=80)
    cache = engine.cache
    assert cache.num_places == plain.num_places == 160 and cache.pool.num_blocks == 10
    for each, places in ((plain, 160), (cache, 176)):
        layer = each.layer(1)
        assert layer.keys.shape[0] == places and each.num_bytes == layer.keys.nbytes + layer.values.nbytes
    made = [engine.add_request(prompt, SamplingParams(max_tokens=9))[0] for prompt in PROMPTS[:2]]
    blocks = set[int]()
    while not engine.is_idle:
        engine.step()
        blocks |= {block for sequence in made for block in sequence.blocks}
    assert blocks and max(blocks) < 10
