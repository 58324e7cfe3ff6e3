"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al., arXiv 2110.01052), as in CALM (Schuster et al.,
2207.07061).

A document's loss is the share of its tokens at which the first confident exit differs from the full model. The goal is
the lowest threshold, one for all exits, whose expected loss is at most δ with a probability of at least 1 − ε over the
drawn documents. The grid of thresholds does not depend on the documents. From the highest to the lowest, the hypothesis
that the expected loss is above δ is tested; the first that can not be rejected at level ε ends the sequence (so no
correction for multiple tests is needed), and the last threshold before it is valid. If several measures of confidence
are tried, each has a sequence at its share of ε.

One threshold serves all exits: a family with one threshold each, chosen on a part of the documents, let tokens leave no
earlier at the same loss when it was tried (the shipped model, untuned heads), and it takes that part away from the
test.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.calibration.calibrate import ExitObservations
from ee_tuning.config.generation import Measure

# d documents · g thresholds of the grid · n tokens

GRID: tuple[float, ...] = (
    *(round(1 - 10 ** (-4 + 3 * i / 80), 6) for i in range(80)),
    *(round(0.9 - 0.005 * i, 6) for i in range(181)),
)
"""Thresholds, most careful first: 0.9999 … 0, dense near 1, where the confidences of good exits are."""


@dataclass(frozen=True)
class Guarantee:
    """The guarantee to be proved: an expected loss of at most `delta`, with probability `confidence`."""

    delta: float
    confidence: float
    measures: tuple[Measure, ...]
    """Measures to try."""

    @property
    def epsilon(self) -> float:
        """Error probability of all tests together."""
        return 1 - self.confidence

    @property
    def num_needed(self) -> int:
        """Fewest documents, even where no exit is ever wrong."""
        needed = documents_needed(self.delta, self.epsilon / len(self.measures))
        assert needed is not None
        return needed


@dataclass(frozen=True)
class Trials:
    """The effect of every threshold of the grid on each document, by one measure."""

    losses: Tensor
    """[d, g] float64, in 0..1: share of the document's tokens at which an exit differs from the full model."""
    depths: Tensor
    """[d, g] float64: mean number of layers of the document's tokens."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result of the tests, by one measure."""

    num_documents: int
    level: float
    """Significance level: ε, or its share where several measures were tried."""
    num_proven: int
    """Number of valid thresholds, from the grid's first on."""
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
        """The lowest valid one, or None."""
        return self.grid[self.num_proven - 1] if self.num_proven else None


def try_thresholds(readings: ExitObservations, measure: Measure) -> Trials:
    """Applies each threshold of the grid to each sample of `readings`, which must all have a token."""
    documents = readings.samples
    lengths = documents.bincount()
    # Differences along the grid: a token leaves at an exit for thresholds up to its confidence there, unless an earlier
    # exit takes it.
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
    """Tests which thresholds of `grid` have an expected loss of at most `delta`, with error probability `epsilon`."""
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
    """Returns the measure whose tokens leave earliest at its lowest valid threshold."""
    return min(
        proofs,
        key=lambda each: (
            float(proofs[each].depths[proofs[each].num_proven - 1]) if proofs[each].num_proven else math.inf
        ),
    )


def guarantee_tree(asked: Guarantee, proofs: Mapping[Measure, Proof]) -> dict[str, object]:
    """Returns the guarantee for a calibration file, with all numbers needed to check the tests."""
    first = next(iter(proofs.values()))
    tests = {
        measure: {
            "num_proven": proof.num_proven,
            "losses": proof.losses.tolist(),
            "mean_depths": proof.depths.tolist(),
            "p_values": proof.p_values.tolist(),
        }
        for measure, proof in proofs.items()
    }
    return {
        "delta": asked.delta,
        "confidence": asked.confidence,
        "epsilon": asked.epsilon,
        "level": first.level,
        "grid": first.grid,
        "tests": tests,
    }


def remedy_text(asked: Guarantee, proof: Proof, units: str) -> str:
    """Returns advice for the case that no threshold is proven."""
    needed = documents_needed(asked.delta, proof.level, float(proof.losses[0]))
    if needed is None:
        return "tune the heads longer, or raise --guarantee"
    return f"about {needed:,} {units} would do for the first"


def hoeffding_bentkus(totals: Tensor, n: int, delta: float) -> Tensor:  # [...] -> [...]
    """Returns p-values of "the expected loss is above `delta`" from `totals`, sums of `n` independent losses in 0..1
    (float64).

    The smaller one of Hoeffding's bound (in the form with the relative entropy) and Bentkus' bound: Bates et al., arXiv
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
    """Counts the rejected hypotheses before the first that is not rejected (fixed-sequence testing)."""
    return (p_values <= level).long().cumprod(-1).sum(-1)


def documents_needed(delta: float, level: float, loss: float = 0.0) -> int | None:
    """Returns the number of documents with mean loss `loss` needed to reject "above `delta`" at `level`, or None.

    The smallest number is for a loss of 0.
    """
    if loss >= delta:
        return None
    return math.ceil(math.log(level) / -float(_relative_entropy(torch.tensor(loss, dtype=torch.float64), delta)))


def _relative_entropy(low: Tensor, delta: float) -> Tensor:
    """Returns the relative entropy of a coin of probability `low` to one of `delta`, in nats."""
    return torch.xlogy(low, low / delta) + (1 - low) * (torch.log1p(-low) - math.log1p(-delta))
