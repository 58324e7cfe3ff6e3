"""Decoding with a drafting head: the tokens of full depth, by drafts that a drafter written down plainly makes, too."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import run_all
from exits import loaded_with, write_exits
from plain_drafter import PlainDrafter, tensors_of
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.config import GenerationSection, load_config
from ee_tuning.decoding.eager_attention import BLOCK_SIZE
from ee_tuning.engine import draft_head_proposer
from ee_tuning.engine.engine import Engine
from ee_tuning.errors import InputError
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy, policy_of
from ee_tuning.serving import cache_size

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64] * 3, [99, 1, 0]]
LISTED = tuple(range(0, 101, 2))
DRAFTED = Policy(has_draft_head=True)


def load(folder: Path, listed: tuple[int, ...], aux_layers: list[int]) -> LoadedModel:
    random_llama(folder / "model", confident=True)
    exits = write_exits(
        folder / "model", folder / "head", listed, exit_layers=[], architecture="eagle3", aux_layers=aux_layers
    )
    return loaded_with(folder / "model", exits, dtype="float64")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random head drafts as many tokens as it may: it believes that they are right."""
    monkeypatch.setattr(draft_head_proposer, "PRIOR", 9.0)


@pytest.fixture(scope="module", params=[(), LISTED], ids=["whole vocabulary", "listed"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tmp_path_factory.mktemp("eagle3"), request.param, [1, 3, 5])


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 6}, {"cache_tokens": 112, "num_slots": 3}])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "seed": 3, "logprobs": 2}, {"stop_token_ids": tuple(range(0, 101, 5))}]
)
def test_tokens_are_those_of_full_depth(loaded: LoadedModel, params: dict, options: dict) -> None:
    """A rejected draft whose keys stay, in the model or in the head; a draft behind an end; a prompt read in parts; a
    sequence that lost its memory and reads states anew.
    """
    said = []
    for policy in (Policy(), DRAFTED):
        engine = Engine(loaded.model, loaded.stages, **{"num_slots": 4, "max_length": 80, **options})
        made = [engine.add_request(prompt, SamplingParams(max_tokens=40, **params), policy)[0] for prompt in PROMPTS]
        run_all(engine)
        said.append([(each.output, each.finish_reason) for each in made])
        assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert said[0] == said[1]
    assert sum(each.statistics.num_drafted for each in made) > (0 if params.get("stop_token_ids") else 40)


@pytest.mark.parametrize(
    ("aux_layers", "prior", "num_tokens", "options"),
    [
        ([0, 2, 6], 9.0, 10, {}),
        ([1, 3, 5], 9.0, 28, {"cache_tokens": 80, "num_slots": 3}),
        ([1, 3, 5], 0.0, 40, {"cache_tokens": 96, "num_slots": 3}),
    ],
)
def test_drafts_are_those_of_a_plain_drafter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    aux_layers: list[int],
    prior: float,
    num_tokens: int,
    options: dict[str, int],
) -> None:
    """States of another token, layer or sequence, an embedding one token too early, keys of rejected drafts in place of
    later tokens', positions that do not go on; states that waited while no draft paid (a prior of 0), more of them than
    may wait, or of a sequence that lost its memory meanwhile.
    """
    monkeypatch.setattr(draft_head_proposer, "PRIOR", prior)
    monkeypatch.setattr(draft_head_proposer, "TRY_EVERY", 7)
    monkeypatch.setattr(draft_head_proposer, "MOST_UNREAD", 4)
    loaded = load(tmp_path, (), aux_layers)
    engine = Engine(loaded.model, loaded.stages, **{"num_slots": 4, "max_length": 80, **options})
    made = [engine.add_request(prompt, SamplingParams(max_tokens=num_tokens), DRAFTED)[0] for prompt in PROMPTS]
    spec = loaded.model.plan.exits[0].draft
    assert spec is not None
    head = next(iter(loaded.model.exit_heads.values()))
    assert isinstance(head, Eagle3Head)
    plain = PlainDrafter(tensors_of(head, loaded.model.config), spec)
    words, checked = loaded.model.backbone.embedding.word_embeddings.weight, 0
    for step in itertools.count():
        if engine.is_idle:
            break
        drafted_before = {each.number: each.statistics.num_drafted for each in made}
        engine.step()
        for sequence in made:
            has_new = sequence.statistics.num_drafted > drafted_before[sequence.number]
            is_checked = has_new and (prior == 0.0 or step % 3 == 0)
            if not is_checked or not sequence.num_drafts or sequence.finish_reason:
                continue
            final, drafts = sequence.tokens[: sequence.num_final], sequence.tokens[sequence.num_final :]
            with torch.inference_mode():
                aux: dict[int, torch.Tensor] = {}
                hidden = loaded.model.embed(torch.tensor([final]))
                aux[0] = hidden
                loaded.model.run_layers(hidden, aux=aux)
                states = [[aux[layer][place, 0] for layer in aux_layers] for place in range(len(final) - 1)]
                embeddings = [words[token] for token in sequence.tokens]
                wanted = [int(logits.argmax()) for logits in plain.drafts(states, embeddings, len(drafts))]
            assert drafts == wanted
            checked += len(drafts)
    assert checked > (20 if prior else 5)
    assert any(each.was_preempted for each in made) == ("cache_tokens" in options)


def test_a_servers_cache_has_room_for_the_heads_keys_too(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that fills the memory with the layers' keys alone, beside which the head's do not fit."""
    monkeypatch.setattr(cache_size, "_free_bytes", lambda topology: 1_000_000)
    random_llama(tmp_path / "model", confident=True)
    plain = loaded_with(tmp_path / "model", None, dtype="float64")
    sizes = []
    for model in (plain.model, loaded.model):
        llm: Any = SimpleNamespace(model=model, defaults=GenerationSection(max_batch_size=10_000))
        sizes.append(cache_size.cache_size(llm, model.topology, None)[0])
    num_layers = loaded.model.config.num_layers
    assert sizes[1] == pytest.approx(sizes[0] * num_layers / (num_layers + 1), abs=BLOCK_SIZE)


def test_a_drafting_head_is_no_exit(loaded: LoadedModel) -> None:
    """Thresholds that nothing reads."""
    for policy, words in (("threshold", "policy threshold needs exits"), ("fixed", "policy fixed needs exits")):
        section = load_config(None, {"generation.policy": policy}).generation
        with pytest.raises(InputError, match=words):
            policy_of(section, (), 6, has_draft_head=True)
