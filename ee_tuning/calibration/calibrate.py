"""`ee-tuning calibrate`: measures on text from which confidence on each exit agrees with the full model.

All exits and the final head read the same tokens, whole texts at once. Exits are processed from shallow to deep, each
on the tokens that have not left before it. An exit's threshold is the lowest one above which its tokens agree with the
final head as often as wanted, judged by the lower end of the confidence interval. A part of the text is held out, to
measure the thresholds on tokens that did not choose them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.config.generation import Measure
from ee_tuning.errors import InputError
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.parallel.shortlist import UNSURE, token_confidences, token_top1
from ee_tuning.parallel.vocab import VocabShard
from ee_tuning.storage.non_finite import no_numbers, num_non_finite

# n tokens · h hidden · v vocabulary

MEASURES: tuple[Measure, ...] = get_args(Measure)
CHUNK = 128
"""Tokens whose logits exist at a time."""
CANDIDATES = 200
"""Number of candidate thresholds: quantiles of the confidences."""
SURENESS = 0.99
"""Confidence level of the interval's lower end."""


@dataclass(frozen=True)
class ExitObservations:
    """Predictions of the exits for the same n tokens."""

    confidences: dict[tuple[int, Measure], Tensor]
    """Exit layer, measure -> [n]."""
    agrees: dict[int, Tensor]
    """Exit layer -> [n] bool: whether its likeliest token is the final head's."""
    samples: Tensor
    """[n] int64: the sample of each token."""
    num_layers: int

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The early exits, shallow to deep."""
        return tuple(sorted(self.agrees))

    @property
    def num_tokens(self) -> int:
        """n."""
        return len(self.samples)

    def only(self, chosen: Tensor) -> "ExitObservations":  # [n] bool
        """Returns the observations of the chosen tokens."""
        return ExitObservations(
            {key: values[chosen] for key, values in self.confidences.items()},
            {layer: values[chosen] for layer, values in self.agrees.items()},
            self.samples[chosen],
            self.num_layers,
        )


@dataclass(frozen=True, kw_only=True)
class ExitResult:
    """One exit at its threshold."""

    threshold: float | None
    """None where no threshold reaches the wanted agreement."""
    share: float
    """Share of tokens that leave, among those that reach the exit."""
    agreement: float
    """Share of agreement among tokens that leave; if no threshold is possible, the best agreement seen."""
    at_least: float
    """Lower end of its interval."""


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """All exits at their thresholds, on some tokens."""

    exits: dict[int, ExitResult]
    mean_depth: float
    """Mean number of layers per token."""
    agreement: float
    """Share of agreement among all tokens. Tokens that do not leave agree, since they are the full model's."""


def check_has_exits(exit_layers: Sequence[int], num_layers: int) -> None:
    """Raises InputError where no exit lies before the last layer."""
    if not any(layer < num_layers for layer in exit_layers):
        raise InputError(
            "calibrate needs exits before the last layer, got none; give --exits FOLDER, of exits and not of a drafting head"
        )


@torch.no_grad()
def read_exits(model: EarlyExitModel, samples: Iterable[Tensor]) -> ExitObservations:  # samples: [s] int64
    """Runs samples through a model on one stage, with every exit on every token. Raises InputError on NaN."""
    last = model.config.num_layers
    known: dict[tuple[int, Measure], list[Tensor]] = {}
    agrees: dict[int, list[Tensor]] = {}

    def look(
        hidden: Tensor,  # [s, 1, h]
        weight: Tensor,
        vocab: VocabShard,
        measures: tuple[Measure, ...],
    ) -> tuple[Tensor, list[Tensor]]:  # [s], [s] each
        ids: list[Tensor] = []
        found: list[list[Tensor]] = [[] for _ in measures]
        for part in hidden[:, 0].split(CHUNK):
            logits = F.linear(part, weight)
            ids.append(token_top1(logits, vocab).token_ids)
            for values, measure in zip(found, measures, strict=True):
                values.append(token_confidences(logits, vocab, measure).double())
        return torch.cat(ids), [torch.cat(values) for values in found]

    lengths = []
    for tokens in samples:
        lengths.append(len(tokens))
        hidden, inputs = model.run_layers(model.embed(tokens[None].to(model.topology.device)))
        if num_non_finite(hidden):
            raise no_numbers(f"the hidden states behind layer {last}", hidden.dtype)
        final = look(model.final_hidden(hidden), model.backbone.output_layer.weight, model.vocab, ())[0]
        for layer in sorted(inputs):
            if layer < last:
                ids, found = model.exit_head(layer)(
                    inputs[layer], lambda hidden, weight: look(hidden, weight, model.exit_vocab, MEASURES)
                )
                agrees.setdefault(layer, []).append(((ids == final) & (found[0] != UNSURE)).cpu())
                for measure, values in zip(MEASURES, found, strict=True):
                    if num_non_finite(values):
                        raise no_numbers(f"the logits behind layer {layer}", hidden.dtype)
                    known.setdefault((layer, measure), []).append(values.cpu())
    return ExitObservations(
        {key: torch.cat(values) for key, values in known.items()},
        {layer: torch.cat(values) for layer, values in agrees.items()},
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        last,
    )


def joined(parts: Sequence[ExitObservations]) -> ExitObservations:
    """Joins the observations of several samples, one part each, as those of one text."""
    first = parts[0]
    return ExitObservations(
        {key: torch.cat([each.confidences[key] for each in parts]) for key in first.confidences},
        {layer: torch.cat([each.agrees[layer] for each in parts]) for layer in first.agrees},
        torch.arange(len(parts)).repeat_interleave(torch.tensor([each.num_tokens for each in parts])),
        first.num_layers,
    )


def choose(readings: ExitObservations, measure: Measure, wanted: float) -> dict[int, float | None]:
    """Chooses, per exit, the lowest confidence above which its tokens agree as often as `wanted`, without tokens of
    earlier exits.
    """
    stays = torch.ones(readings.num_tokens, dtype=torch.bool)
    thresholds: dict[int, float | None] = {}
    for layer in readings.exit_layers:
        confidence = readings.confidences[layer, measure]
        thresholds[layer] = next(
            (
                each
                for each in _candidates(confidence[stays])
                if lower_end(readings, layer, stays & (confidence >= each)) >= wanted
            ),
            None,
        )
        if (threshold := thresholds[layer]) is not None:
            stays &= confidence < threshold
    return thresholds


def score_thresholds(
    readings: ExitObservations, measure: Measure, thresholds: dict[int, float | None]
) -> CalibrationResult:
    """Measures the effect of these thresholds."""
    stays = torch.ones(readings.num_tokens, dtype=torch.bool)
    depth, agreed, exits = 0.0, 0, {}
    for layer in readings.exit_layers:
        confidence, agrees = readings.confidences[layer, measure], readings.agrees[layer]
        threshold, reached = thresholds[layer], int(stays.sum())
        leaves = stays & (confidence >= (threshold if threshold is not None else 2.0))
        count, right = int(leaves.sum()), int((leaves & agrees).sum())
        if threshold is None:
            best = max(
                (lower_end(readings, layer, stays & (confidence >= each)) for each in _candidates(confidence[stays])),
                default=0.0,
            )
            exits[layer] = ExitResult(threshold=None, share=0.0, agreement=best, at_least=best)
        else:
            exits[layer] = ExitResult(
                threshold=threshold,
                share=count / max(reached, 1),
                agreement=right / max(count, 1),
                at_least=lower_end(readings, layer, leaves),
            )
        depth, agreed, stays = depth + count * layer, agreed + right, stays & ~leaves
    left = int(stays.sum())
    return CalibrationResult(
        exits=exits,
        mean_depth=(depth + left * readings.num_layers) / readings.num_tokens,
        agreement=(agreed + left) / readings.num_tokens,
    )


def best_measure(
    readings: ExitObservations, wanted: float, asked: Literal["best"] | Measure
) -> tuple[Measure, dict[int, float | None]]:
    """Returns (measure, thresholds): the measure asked for, or the one whose tokens leave earliest."""
    tried = [(measure, choose(readings, measure, wanted)) for measure in (MEASURES if asked == "best" else (asked,))]
    return min(tried, key=lambda each: score_thresholds(readings, *each).mean_depth)


def lower_end(readings: ExitObservations, layer: int, leaves: Tensor) -> float:  # [n] bool
    """Returns the one-sided lower end, at SURENESS, of the interval of an exit's agreement on these tokens; 0 without
    tokens.

    It is the lower one of two: Wilson's (1927), for independent tokens, and that of a ratio over independent samples
    (Cochran 1977, 6.3), since the tokens of a sample are hard or easy together.
    """
    counts = torch.bincount(readings.samples[leaves])
    count, z = int(counts.sum()), NormalDist().inv_cdf(SURENESS)
    if count == 0:
        return 0.0
    rights = torch.bincount(readings.samples[leaves & readings.agrees[layer]], minlength=len(counts))
    share, spread = int(rights.sum()) / count, z * z / count
    wilson = (share + spread / 2 - z * math.sqrt(share * (1 - share) / count + spread / (4 * count))) / (1 + spread)
    deviation = float((rights - share * counts).square().sum().sqrt()) / count
    return max(0.0, min(wilson, share - z * deviation))


def curve(
    readings: ExitObservations, layer: int, measure: Measure, num_points: int = 101
) -> list[tuple[float, float, float]]:
    """Returns (threshold, share of tokens at or above it, their agreement) for thresholds from 0 to 1 with any
    tokens.
    """
    confidence, agrees = readings.confidences[layer, measure], readings.agrees[layer]
    points = []
    for threshold in torch.linspace(0, 1, num_points, dtype=torch.float64).tolist():
        leaves = confidence >= threshold
        if leaves.any():
            points.append((round(threshold, 4), float(leaves.double().mean()), float(agrees[leaves].double().mean())))
    return points


def _candidates(confidence: Tensor) -> list[float]:  # [n]
    """Returns candidate thresholds, lowest first, none of them as low as UNSURE."""
    ordered = confidence[confidence >= 0].sort()[0]
    return (
        ordered[torch.linspace(0, len(ordered) - 1, min(CANDIDATES, len(ordered))).long()].unique().tolist()
        if len(ordered)
        else []
    )
