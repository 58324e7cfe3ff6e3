"""Log-probabilities of given continuations, against transformers and an artifact's heads applied by hand. In
float64.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder, confidence
from random_models import random_model

from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.generation import scoring
from ee_tuning.generation.scoring import Score, score, score_by, token_pairs
from ee_tuning.sampling.policy import policy_of

PAIRS = [
    ([5, 17, 80, 3, 9], [41, 6, 7]),
    ([41], [2]),
    ([41], [3]),
    ([7, 7, 7, 90, 12, 60], [33, 2, 51, 18, 64, 9, 12]),
    ([99, 1], [0] * 4),
]
HEADS = {
    "mlp": {"architecture": "mlp"},
    "layer, norm tied": {"architecture": "layer,norm", "output": "tied"},
    "adapter": {"architecture": "adapter"},
}
POLICIES = {
    "full": {"policy": "full"},
    "speculative": {"policy": "speculative"},
    "fixed": {"policy": "fixed", "exit_layer": 2},
    "threshold": {"threshold": 0.6},
    "margin": {"threshold": "0.5,0.3", "measure": "margin"},
    "entropy": {"threshold": 0.7, "measure": "entropy"},
}


class Subject(NamedTuple):
    model: torch.nn.Module
    plain: PlainDecoder


def subject(family: str, folder: Path, **heads: str) -> Subject:
    reference = random_model(family, folder / "model", confident=True)
    exits = write_exits(folder / "model", folder / "exits", **heads)
    model = loaded_with(folder / "model", exits, dtype="float64").model
    return Subject(model, PlainDecoder(reference, exits, (2, 4), torch.float64))


@pytest.fixture(scope="module", params=HEADS)
def each_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject("llama", tmp_path_factory.mktemp("subject"), **HEADS[request.param])


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject("gpt2", tmp_path_factory.mktemp("mlp"))


def scored(model, pairs: list[tuple[list[int], list[int]]], max_rows: int = 32, **keys: object) -> list[Score]:
    generation = load_config(None, {f"generation.{key}": value for key, value in keys.items()}).generation
    policy = policy_of(generation, model.plan.exit_layers, model.config.num_layers)
    return score(
        model, token_pairs(model, lambda text, begins: [ord(letter) % 101 for letter in text], pairs), policy, max_rows
    )


def plainly(
    plain: PlainDecoder,
    pair: tuple[list[int], list[int]],
    *,
    policy: str = "threshold",
    exit_layer: int = 0,
    threshold: float | str = 2.0,
    measure: str = "max_probability",
) -> Score:
    """The same without any sharing, padding, batching or shortcut."""
    context, continuation = pair
    asked = dict(zip((2, 4), map(float, str(threshold).split(",") * 2), strict=False))
    logits = plain.logits([*context, *continuation][:-1])
    logprobs, is_greedy, left = [], [], []
    for at, token in enumerate(continuation, len(context) - 1):
        early = [
            layer
            for layer in (2, 4)
            if policy == "threshold" and confidence(logits[layer][at], measure) >= asked[layer]
        ]
        left.append(exit_layer or (early or [6])[0])
        row = logits[left[-1]][at]
        logprobs.append(row.log_softmax(-1)[token].item())
        is_greedy.append(int(row.argmax()) == token)
    return Score(token_ids=continuation, logprobs=logprobs, is_greedy=is_greedy, exit_layers=left)


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_are_those_of_heads_applied_by_hand(each_kind, policy):
    """A position that takes its neighbour's distribution, a padded row that is seen, an exit that is asked though an
    earlier one had it.
    """
    keys, left = POLICIES[policy], set[int]()
    for told, pair in zip(scored(each_kind.model, PAIRS, **keys), PAIRS, strict=True):
        wanted = plainly(each_kind.plain, pair, **keys)
        assert told.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)  # transformers rotates in float32
        assert (told.is_greedy, told.exit_layers, told.token_ids) == (
            wanted.is_greedy,
            wanted.exit_layers,
            wanted.token_ids,
        )
        assert told.logprob == pytest.approx(sum(wanted.logprobs), abs=1e-3)
        left |= set(told.exit_layers)
    assert len(left) > 1 or policy in ("full", "speculative", "fixed")


def test_one_pass_scores_by_all_policies(each_kind):
    """A position that is taken out for one policy because it left by another; a measure's column read for another
    measure.
    """
    model, wanted = each_kind.model, {name: scored(each_kind.model, PAIRS, **keys) for name, keys in POLICIES.items()}
    policies = [
        policy_of(load_config(None, {f"generation.{key}": value for key, value in keys.items()}).generation, (2, 4), 6)
        for keys in POLICIES.values()
    ]
    for told, each in zip(score_by(model, PAIRS, policies, max_rows=3), wanted.values(), strict=True):
        assert [(x.is_greedy, x.exit_layers) for x in told] == [(x.is_greedy, x.exit_layers) for x in each]
        assert [x.logprob for x in told] == pytest.approx([x.logprob for x in each], abs=1e-9)


def test_the_likeliest_tokens_are_told(each_kind):
    """Likeliest tokens of the final head where an exit has the position; one that equals its own log-probability
    almost.
    """
    policy = policy_of(load_config(None, {"generation.threshold": "0.6"}).generation, (2, 4), 6)
    for told, (context, continuation) in zip(score_by(each_kind.model, PAIRS, [policy], 3, 4)[0], PAIRS, strict=True):
        logits = each_kind.plain.logits([*context, *continuation][:-1])
        for at, (token, layer, top) in enumerate(
            zip(continuation, told.exit_layers, told.top_logprobs, strict=True), len(context) - 1
        ):
            values, ids = logits[layer][at].log_softmax(-1).topk(4)
            assert list(top) == ids.tolist() and list(top.values()) == pytest.approx(values.tolist(), abs=2e-4)
            assert token not in top or top[token] == told.logprobs[at - len(context) + 1]


def test_a_greedy_continuation_is_greedy_at_each_exit(mlp):
    """`is_greedy` of the final head's token where an exit is asked: accuracy of single-token answers is then the full
    model's.
    """
    context = [5, 17, 80, 3, 9]
    logits = mlp.plain.logits(context)
    for layer, keys in ((2, {"policy": "fixed", "exit_layer": 2}), (6, {"policy": "full"})):
        best = int(logits[layer][-1].argmax())
        told = scored(mlp.model, [(context, [best]), (context, [(best + 1) % 101])], **keys)
        assert [each.is_greedy for each in told] == [[True], [False]]


@pytest.mark.parametrize(("max_rows", "pass_tokens", "chunk"), [(1, 2048, 128), (2, 2048, 3), (32, 8, 1)])
def test_batches_and_chunks_do_not_matter(mlp, monkeypatch, max_rows, pass_tokens, chunk):
    """Answers in the order of lengths, or a chunk's last position lost."""
    wanted = scored(mlp.model, PAIRS, threshold=0.6)
    monkeypatch.setattr(scoring, "PASS_TOKENS", pass_tokens)
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    for told, each in zip(scored(mlp.model, PAIRS, max_rows, threshold=0.6), wanted, strict=True):
        assert told.exit_layers == each.exit_layers and told.logprobs == pytest.approx(each.logprobs, abs=1e-9)


def test_contexts_are_cut_from_the_left(mlp):
    """A harness's few-shot prompt that is longer than the model's context would end the whole run."""
    long = [*range(100)] * 2
    (told,) = scored(mlp.model, [(long, [4, 5, 6])], policy="full")
    (wanted,) = scored(mlp.model, [(long[-126:], [4, 5, 6])], policy="full")
    assert told == wanted == plainly_full(mlp.plain, (long[-126:], [4, 5, 6]), told)


def plainly_full(plain: PlainDecoder, pair: tuple[list[int], list[int]], told: Score) -> Score:
    """`told`, where it is what transformers says."""
    wanted = plainly(plain, pair, policy="full")
    assert told.logprobs == pytest.approx(wanted.logprobs, abs=1e-9) and told.is_greedy == wanted.is_greedy
    return told


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [3]), "the context of a pair to score must hold at least one token"),
        (([3], []), "the continuation of a pair"),
        (([3], [101]), "token ids must be integers in 0..100"),
        (([3], [1] * 129), "at most the 128 tokens"),
    ],
)
def test_what_can_not_be_scored_is_refused(mlp, pair, words):
    """An index error deep in an embedding, or a score of nothing, which sums to probability one."""
    with pytest.raises(InputError, match=words):
        scored(mlp.model, [PAIRS[0], pair])


def test_texts_are_read_as_one(mlp):
    """Two texts tokenized each for itself: another beginning-of-text token in the middle, or the space of a word left
    with the context.
    """
    encode = lambda text, begins: [100] * begins + [ord(letter) % 100 for letter in text]  # noqa: E731
    assert token_pairs(mlp.model, encode, [("ab ", "cd"), ("", "cd"), ("  ", "c")]) == [
        ([100, 97, 98], [32, 99, 0]),
        ([100], [99, 0]),
        ([100], [32, 32, 99]),
    ]


def test_numbers_that_are_none_are_refused(mlp):
    """NaN that becomes the metric of a whole task."""
    weight = mlp.model.exit_head(2).output_weight
    kept = weight.data[5, 0].item()
    weight.data[5, 0] = torch.nan
    try:
        with pytest.raises(InputError, match="the logits behind layer 2 are no numbers"):
            scored(mlp.model, PAIRS, policy="fixed", exit_layer=2)
    finally:
        weight.data[5, 0] = kept
