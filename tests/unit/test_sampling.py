"""Claims about choosing a token: transformers' distribution, drawn fairly, and a sequence's draws independent of its batch."""
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ee_tuning.generation.sampling import choose_token, draw, probabilities


def _logits(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)) * scale


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (1.3, 40, 0.8), (0.5, 3, 0.5), (2.0, 1000, 0.99), (1.0, 0, 0.01)])
def test_the_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    """Top-p before top-k, or before the temperature, keeps other tokens. Equal logits at the k-th place are all kept."""
    logits = (_logits(6, 101) * 2).round() / 2  # many ties
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.zeros(6, 1, dtype=torch.long), logits.clone()).softmax(-1)
    assert torch.equal(probabilities(logits, temperature, top_k, top_p), expected)
    assert torch.equal(probabilities(logits[2], temperature, top_k, top_p), expected[2])


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws, 19 degrees of freedom: a value above 43.8 has probability 0.001 if draws are fair."""
    distribution = probabilities(_logits(20, scale=1.0), 1.0, 0, 1.0)
    generator = torch.Generator().manual_seed(5)
    counts = torch.bincount(torch.stack([draw(distribution, generator) for _ in range(20_000)]), minlength=20)
    expected = distribution.double() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_draws_of_a_filtered_distribution_stay_inside_it() -> None:
    """A uniform number at the edge of the cumulative sum must not land on a token that was filtered out."""
    logits = _logits(50)
    kept = probabilities(logits, 1.0, 4, 1.0) > 0
    generator = torch.Generator().manual_seed(6)
    drawn = {int(choose_token(logits, 1.0, 4, 1.0, generator)) for _ in range(500)}
    assert drawn == set(kept.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2 ** -53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_probability(monkeypatch: pytest.MonkeyPatch, uniform: float) -> None:
    """0 would pick a leading token of probability 0; just below 1 would, in float32, reach the total and pick past the last."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([uniform], dtype=torch.float64))
    distribution = torch.tensor([0.0, 0.3, 0.7 + 1e-6, 0.0])
    assert draw(distribution, torch.Generator()).item() == (1 if uniform == 0.0 else 2)


def test_a_sequence_draws_the_same_tokens_in_any_batch() -> None:
    """One generator for the batch would make a prompt's text depend on its neighbours."""
    logits = _logits(4, 3, 60, scale=1.0)  # steps, sequences, v
    together, alone = _generators(1, 2, 3), _generators(3)
    batch = [choose_token(step, 0.9, 0, 0.95, together).tolist() for step in logits]
    single = [choose_token(step[2], 0.9, 0, 0.95, alone[0]).item() for step in logits]
    assert [row[2] for row in batch] == single
    again = _generators(1, 2, 3)
    assert batch == [choose_token(step, 0.9, 0, 0.95, again).tolist() for step in logits]


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    """A greedy step that took a number from the generator would shift every draw after it."""
    logits = torch.tensor([[1.0, 4.0, 4.0], [2.0, 0.0, 2.0]])
    generators = _generators(1, 2)
    before = [g.get_state() for g in generators]
    assert choose_token(logits, 0.0, 2, 0.5, generators).tolist() == [1, 0]
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))
    assert choose_token(logits[0], 0.0, 0, 1.0, None).item() == 1
