"""Claims about choosing a token: transformers' distribution, drawn fairly, and draws that depend on their key alone."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.sampling.sampling import draw, request_key, sample_seed, warped


def _logits(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)) * scale


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.3, 40, 0.8, 0.1),
        (0.5, 3, 0.5, 0.0),
        (2.0, 1000, 0.99, 0.05),
        (1.0, 0, 0.01, 0.0),
        (1.0, 0, 1.0, 1.0),
    ],
)
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Top-p before top-k, or before the temperature, keeps other tokens. Equal logits at the k-th place are all
    kept.
    """
    logits = (_logits(6, 101) * 2).round() / 2  # many ties
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.zeros(6, 1, dtype=torch.long), logits.clone()).softmax(-1)
    assert torch.equal(warped(logits, temperature, top_k, top_p, min_p).softmax(-1), expected)
    assert torch.equal(warped(logits[2], temperature, top_k, top_p, min_p).softmax(-1), expected[2])


def _keys(seed: int, count: int) -> list[int]:
    request = request_key(seed, [1, 2, 3])
    return [sample_seed(request, place) for place in range(count)]


@pytest.mark.parametrize("seed", [5, 6])
def test_draws_follow_the_distribution(seed: int) -> None:
    """Chi-square over 20,000 draws, 19 degrees of freedom: a value above 43.8 has probability 0.001 if draws are
    fair.
    """
    distribution = warped(_logits(20, scale=1.0), 1.0).softmax(-1)
    counts = torch.bincount(draw(distribution.expand(20_000, -1), _keys(seed, 20_000)), minlength=20)
    expected = distribution.double() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_neighbouring_draws_do_not_know_of_each_other() -> None:
    """Keys that differ by little must not give draws that go together: chi-square of pairs, 24 degrees of freedom,
    0.001 at 51.2.
    """
    drawn = draw(torch.ones(20_001, 5), _keys(7, 20_001))
    pairs = torch.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25)
    assert ((pairs - 800.0) ** 2 / 800).sum() < 51.2


def test_draws_of_a_filtered_distribution_stay_inside_it() -> None:
    """A token that was filtered out, drawn at an edge."""
    distribution = warped(_logits(50), 1.0, top_k=4).softmax(-1)
    drawn = set(draw(distribution.expand(500, -1), _keys(6, 500)).tolist())
    assert drawn == set((distribution > 0).nonzero()[:, 0].tolist())


def test_a_draw_hangs_on_seed_prompt_completion_and_place_alone() -> None:
    """One stream of numbers for a batch would make a prompt's text depend on its neighbours."""
    distribution = warped(_logits(3, 60, scale=1.0), 0.9).softmax(-1)
    together = draw(distribution, _keys(1, 3)).tolist()
    assert together == [int(draw(distribution[i : i + 1], [key])) for i, key in enumerate(_keys(1, 3))]
    keys = {
        request_key(1, [1, 2]),
        request_key(2, [1, 2]),
        request_key(1, [12]),
        request_key(1, [1, 2], 1),
        sample_seed(1, 2),
        sample_seed(12, 0),
    }
    assert len(keys) == 6


@pytest.mark.parametrize("closeness", [0.02, 0.1, 0.4])
def test_like_distributions_mostly_draw_alike(closeness: float) -> None:
    """Speculation rests on it: at least (1 - d) / (1 + d) of the draws agree, d the total variation distance."""
    p = warped(_logits(40, scale=1.0), 1.0).softmax(-1).double()
    q = warped(_logits(40, scale=1.0) + closeness * _logits(2, 40)[1], 1.0).softmax(-1).double()
    distance = float((p - q).abs().sum() / 2)
    keys = _keys(3, 20_000)
    agreed = (draw(p.expand(20_000, -1), keys) == draw(q.expand(20_000, -1), keys)).double().mean()
    assert agreed >= (1 - distance) / (1 + distance) - 0.01
