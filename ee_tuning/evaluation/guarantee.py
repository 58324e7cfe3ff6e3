"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al., arXiv 2110.01052), as CALM uses it (Schuster et
al., 2207.07061).

A document's loss is the share of its tokens at which the first exit that is sure enough does not say what the full
model says. Wanted is the lowest threshold, one for all exits, whose expected loss is at most δ, with a probability of
at least 1 − ε over the documents that were drawn. For each threshold of a grid that no document has a part in, from the
highest to the lowest, the hypothesis that its expected loss is above δ is tested; the first that can not be rejected at
level ε ends the sequence (so no correction for many tests is due), and the last before it holds. Where several measures
of confidence are tried, each has a sequence at its share of ε.

One threshold for all exits: a family with a threshold for each, by the agreement that a part of the documents shows,
let tokens leave no earlier at the same loss where it was tried (the shipped model, heads not tuned), and takes that
part from the test.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.config.generation import Measure
from ee_tuning.evaluation.calibrate import ExitObservations

# d documents · g thresholds of the grid · n tokens

GRID: tuple[float, ...] = (
    *(round(1 - 10 ** (-4 + 3 * i / 80), 6) for i in range(80)),
    *(round(0.9 - 0.005 * i, 6) for i in range(181)),
)
"""Thresholds, most careful first: 0.9999 … 0, close to each other near 1, where good exits' confidences are."""


@dataclass(frozen=True)
class Trials:
    """What every threshold of the grid does to each document, by one measure."""

    losses: Tensor
    """[d, g] float64, in 0..1: share of the document's tokens at which an exit says something else than the full model.
    """
    depths: Tensor
    """[d, g] float64: layers that the document's tokens go through, on average."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of the tests, by one measure."""

    num_documents: int
    level: float
    """The p-value that a threshold may have: ε, or its share where several measures were tried."""
    num_proven: int
    """Thresholds of the grid, from its first on, that hold; 0 where none does."""
    p_values: Tensor
    """[g]"""
    losses: Tensor
    """[g]: mean over the documents."""
    depths: Tensor
    """[g]: mean over the documents."""
    grid: tuple[float, ...] = GRID
    """Thresholds, most careful first, of which the first g were tried."""

    @property
    def threshold(self) -> float | None:
        """The lowest that holds; None where none does."""
        return self.grid[self.num_proven - 1] if self.num_proven else None


def try_thresholds(readings: ExitObservations, measure: Measure) -> Trials:
    """Each threshold of the grid on each sample of `readings`; every sample has a token there."""
    documents = readings.samples
    lengths = documents.bincount()
    # Differences along the grid: a token leaves at an exit from one threshold on, up to the one by which it leaves at
    # an exit before.
    wrong = torch.zeros(len(lengths), len(GRID) + 1, dtype=torch.int64)
    saved = torch.zeros_like(wrong)
    falling = -torch.tensor(GRID, dtype=torch.float64)
    end = torch.full_like(documents, len(GRID))
    for layer in readings.exit_layers:
        begin = torch.minimum(torch.searchsorted(falling, -readings.confidences[layer, measure].double()), end)
        differs = (~readings.agrees[layer]).long()
        spared = torch.full_like(differs, readings.num_layers - layer)
        for sums, values in ((wrong, differs), (saved, spared)):
            sums.index_put_((documents, begin), values, accumulate=True)
            sums.index_put_((documents, end), -values, accumulate=True)
        end = begin
    per_token = [sums.cumsum(1)[:, :-1].double() / lengths[:, None] for sums in (wrong, saved)]
    return Trials(per_token[0], readings.num_layers - per_token[1])


def prove(
    trials: Mapping[Measure, Trials], delta: float, epsilon: float, grid: tuple[float, ...] = GRID
) -> dict[Measure, Proof]:
    """Which thresholds of `grid` have an expected loss of at most `delta`; that one of them has more has a probability
    of at most `epsilon`.
    """
    proofs = {}
    for measure, each in trials.items():
        n, level = len(each.losses), epsilon / len(trials)
        p_values = hoeffding_bentkus(each.losses.sum(0), n, delta)
        proofs[measure] = Proof(
            num_documents=n,
            level=level,
            num_proven=int(num_rejected(p_values, level)),
            p_values=p_values,
            losses=each.losses.mean(0),
            depths=each.depths.mean(0),
            grid=grid,
        )
    return proofs


def earliest(proofs: Mapping[Measure, Proof]) -> Measure:
    """The measure whose tokens leave earliest, at the lowest threshold that holds."""
    return min(
        proofs,
        key=lambda each: (
            float(proofs[each].depths[proofs[each].num_proven - 1]) if proofs[each].num_proven else math.inf
        ),
    )


def hoeffding_bentkus(totals: Tensor, n: int, delta: float) -> Tensor:  # [...] -> [...]
    """p-values of "the expected loss is above `delta`", from `totals`, sums of `n` independent losses in 0..1 each
    (float64).

    The smaller one of Hoeffding's (in the form with the relative entropy) and Bentkus' bound: Bates et al., arXiv
    2101.02703, section 3.1.
    """
    low = (totals / n).clamp(max=delta)
    hoeffding = torch.exp(-n * _relative_entropy(low, delta))
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choices = (
        torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    )
    tails = torch.exp(log_choices + k * math.log(delta) + (n - k) * math.log1p(-delta)).cumsum(0)
    bentkus = math.e * tails[totals.ceil().long().clamp(max=n)]
    return torch.minimum(hoeffding, bentkus).clamp(max=1.0)


def num_rejected(p_values: Tensor, level: float) -> Tensor:  # [..., g] -> [...]
    """Fixed-sequence testing: hypotheses that are rejected before the first that is not, those behind it never looked
    at.
    """
    return (p_values <= level).long().cumprod(-1).sum(-1)


def documents_needed(delta: float, level: float, loss: float = 0.0) -> int | None:
    """Number of documents with a mean loss of `loss` that rejects "above `delta`" at `level`; None where none does. 0
    is the least loss.
    """
    if loss >= delta:
        return None
    return math.ceil(math.log(level) / -float(_relative_entropy(torch.tensor(loss, dtype=torch.float64), delta)))


def _relative_entropy(low: Tensor, delta: float) -> Tensor:
    """Relative entropy of a coin of probability `low` to one of `delta`, nats."""
    return torch.xlogy(low, low / delta) + (1 - low) * (torch.log1p(-low) - math.log1p(-delta))
