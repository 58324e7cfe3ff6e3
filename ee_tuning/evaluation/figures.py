"""The figures of an evaluation per task and policy: metric, speed, depth and agreement, with intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ee_tuning.evaluation.bootstrap import Estimate, Floats, Resampled
from ee_tuning.evaluation.points import Point, PointKind
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.evaluation.task import Metric, Task

SumsByName = Mapping[str, Floats]


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """One policy on one task. Intervals are over prompts, and ratios are to full depth on the same prompts."""

    name: str
    kind: PointKind
    value: float | None
    """The threshold, or the layer of the fixed exit."""
    metric: Estimate
    """Mean over prompts; for perplexity exp of the mean negative log-likelihood per token."""
    other_metrics: dict[str, Estimate]
    relative: Estimate
    """metric ÷ full depth's."""
    speedup: Estimate | None
    """Tokens per second ÷ full depth's, prefill included; None where nothing is generated."""
    time_saved: Estimate | None
    """1 - seconds of all prompts ÷ full depth's. Differs from `speedup` where completions have other lengths."""
    tokens_per_second: float | None
    """The speed of one replica."""
    mean_depth: Estimate
    """Mean layer after which tokens left."""
    agreement: Estimate | None
    """Share of tokens that the full model predicts, too, after the same prefix; None where nothing is generated."""
    identical: Estimate | None
    """Share of prompts whose completion, or choice, is that of full depth; None for perplexity."""
    exits: dict[int, Estimate]
    """Layer -> share of tokens that left there; the number of layers for those that did not leave early."""
    num_tokens: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The figures of one task."""

    name: str
    metric: Metric
    num_prompts: int
    points: list[PointResult]
    """Full depth first."""

    @property
    def full_depth(self) -> PointResult:
        """The reference of all ratios."""
        return self.points[0]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of all tasks."""

    num_layers: int
    tasks: list[TaskResult]
    readings: list[ItemResult]
    """Results by prompt."""


def task_result(
    task: Task,
    points: Sequence[Point],
    readings: Sequence[ItemResult],
    *,
    seed: int = 0,
) -> TaskResult:
    """Computes the figures of one task from its results under `points`, full depth first."""
    by_point = {
        point.name: sorted((each for each in readings if each.point == point.name), key=lambda each: each.item)
        for point in points
    }
    layers = sorted({layer for each in readings for layer in each.exits})
    columns: dict[str, list[float]] = {}
    for name, found in by_point.items():
        columns |= {
            f"{name}/weight": [each.weight for each in found],
            f"{name}/tokens": [each.num_tokens for each in found],
            f"{name}/agreed": [each.num_agreed or 0 for each in found],
            f"{name}/same": [float(each.is_same or 0) for each in found],
            f"{name}/prompts": [1.0] * len(found),
            f"{name}/layers": [sum(layer * count for layer, count in each.exits.items()) for each in found],
            **{f"{name}/score {key}": [each.scores[key] for each in found] for key in found[0].scores},
            **{f"{name}/left {layer}": [each.exits.get(layer, 0) for each in found] for layer in layers},
        }
    prompts = Resampled(columns, seed=seed)
    times = _times(by_point, seed)
    results = [
        _point_result(task, point, by_point[point.name], layers, points[0].name, prompts, times) for point in points
    ]
    return TaskResult(name=task.name, metric=task.metric, num_prompts=len(task.items), points=results)


def _times(by_point: Mapping[str, list[ItemResult]], seed: int) -> Resampled | None:
    """Returns tokens and seconds by group, since prompts that were timed together must be drawn together."""
    columns: dict[str, list[float]] = {}
    for name, found in by_point.items():
        tokens, seconds = dict[str, int](), dict[str, float]()
        for each in found:
            if each.seconds is None:
                return None
            tokens[each.group] = tokens.get(each.group, 0) + each.num_tokens
            seconds[each.group] = each.seconds
        groups = sorted(tokens)
        columns |= {
            f"{name}/tokens": [tokens[group] for group in groups],
            f"{name}/seconds": [seconds[group] for group in groups],
        }
    return Resampled(columns, seed=seed)


def _point_result(
    task: Task,
    point: Point,
    found: list[ItemResult],
    layers: list[int],
    full: str,
    prompts: Resampled,
    times: Resampled | None,
) -> PointResult:
    name, keys = point.name, list(found[0].scores)

    def share(what: str, of: str) -> Callable[[SumsByName], Floats]:
        return lambda sums: sums[f"{name}/{what}"] / sums[f"{name}/{of}"]

    def metric(way: str, key: str) -> Callable[[SumsByName], Floats]:
        mean: Callable[[SumsByName], Floats] = lambda sums: sums[f"{way}/score {key}"] / sums[f"{way}/weight"]  # noqa: E731
        return (lambda sums: np.exp(mean(sums))) if task.metric == "perplexity" else mean

    metrics = {key: prompts.estimate(metric(name, key)) for key in keys}
    seconds = None if times is None else math.fsum({each.group: each.seconds or 0.0 for each in found}.values())
    num_tokens = sum(each.num_tokens for each in found)
    return PointResult(
        name=name,
        kind=point.kind,
        value=point.value,
        metric=metrics[task.metric],
        other_metrics={key: value for key, value in metrics.items() if key != task.metric},
        relative=prompts.estimate(lambda sums: metric(name, task.metric)(sums) / metric(full, task.metric)(sums)),
        speedup=None if times is None else times.estimate(lambda sums: _rate(sums, name) / _rate(sums, full)),
        time_saved=None
        if times is None
        else times.estimate(lambda sums: 1 - sums[f"{name}/seconds"] / sums[f"{full}/seconds"]),
        tokens_per_second=num_tokens / seconds if seconds else None,
        mean_depth=prompts.estimate(share("layers", "tokens")),
        agreement=None if found[0].num_agreed is None else prompts.estimate(share("agreed", "tokens")),
        identical=None if found[0].is_same is None else prompts.estimate(share("same", "prompts")),
        exits={layer: prompts.estimate(share(f"left {layer}", "tokens")) for layer in layers},
        num_tokens=num_tokens,
        seconds=seconds,
    )


def _rate(sums: SumsByName, name: str) -> Floats:
    return sums[f"{name}/tokens"] / sums[f"{name}/seconds"]
