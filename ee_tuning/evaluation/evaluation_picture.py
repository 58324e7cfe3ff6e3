"""Pictures of an evaluation, like figures 5 to 9 of EE-Tuning: quality against speed-up, and the layers at which tokens
left.
"""

import math
from pathlib import Path
from typing import Any

from ee_tuning.evaluation.bootstrap import Estimate
from ee_tuning.evaluation.figures import Evaluation, PointResult, TaskResult
from ee_tuning.pictures import CURVE, MUTED, draw_exit_shares, label_point, picture

_COLOURS = {"fixed": "#c2571a", "speculative": "#1f8a4c", "calibration": "#8a3ffc", "all_layers": "#b0256b"}
_MARKS = {"fixed": "s", "speculative": "D", "calibration": "^", "all_layers": "*"}
_LEGEND = {"threshold": "by threshold", "fixed": "at one exit (its layer)", "speculative": "speculative"}
_WIDE = 3.0
"""Speed-up above which the axis is logarithmic, since fixed exits would squeeze all other points together."""
_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Ticks of the logarithmic axis."""

NAMES = {
    "exact": "exact answers, %",
    "contains": "answers contained, %",
    "rouge-l": "ROUGE-L, %",
    "choice": "right choices, %",
    "perplexity": "perplexity (lower is better)",
}


def draw_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Draws two PNGs per task and returns their paths. Raises InputError where one can not be written."""
    paths = []
    for task in found.tasks:
        height = 0.9 + 0.42 * (len(task.points) + 2)
        for name, size, draw in (("quality", (8, 5), draw_quality), ("exits", (8, height), draw_exits)):
            paths.append(folder / f"{name}-{task.name}.png")
            with picture(paths[-1], size=size) as (axes,):
                draw(axes, task, found.num_layers)
    return paths


def draw_quality(axes: Any, task: TaskResult, num_layers: int) -> None:
    """Draws quality against speed-up, or against depth where nothing was timed, with intervals in both directions."""
    scale = 1.0 if task.metric == "perplexity" else 100.0
    is_timed = task.full_depth.speedup is not None
    _draw_full_depth(axes, task, scale, num_layers)
    curve = [point for point in task.points if point.kind == "threshold"]
    axes.plot(
        [_across(point, num_layers).value for point in curve],
        [scale * point.metric.value for point in curve],
        "-",
        color=CURVE,
        linewidth=1.2,
    )
    labels = set[str]()
    for place, point in enumerate(task.points[1:]):
        label = _LEGEND.get(point.kind, point.name)
        _draw_point(axes, point, _across(point, num_layers), scale, label if label not in labels else None)
        labels.add(label)
        if point.value is not None:
            label_point(axes, f"{point.value:g}", (_across(point, num_layers).value, scale * point.metric.value), place)
    axes.margins(0.08, 0.12)
    if is_timed and max(_across(point, num_layers).value for point in task.points) > _WIDE:
        _make_logarithmic(axes)
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.set(
        title=f"{task.name}: {task.num_prompts} prompts, 95% intervals",
        ylabel=NAMES[task.metric],
        xlabel="speed-up over full depth, same run" if is_timed else "layers saved per token, % (nothing is timed)",
    )


def _draw_full_depth(axes: Any, task: TaskResult, scale: float, num_layers: int) -> None:
    full, look = task.full_depth, {"color": MUTED, "linewidth": 1}
    low, value, high = (scale * each for each in (full.metric.low, full.metric.value, full.metric.high))
    axes.axhspan(low, high, color=MUTED, alpha=0.12, linewidth=0)
    axes.axhline(value, linestyle="--", label="full depth, and its interval", **look)
    axes.plot(_across(full, num_layers).value, value, "o", color=MUTED, markerfacecolor="none", markersize=10)
    if full.speedup is not None:
        axes.axvline(1.0, linestyle=":", **look)


def _draw_point(axes: Any, point: PointResult, across: Estimate, scale: float, label: str | None) -> None:
    colour = _COLOURS.get(point.kind, CURVE)
    axes.errorbar(
        across.value,
        scale * point.metric.value,
        xerr=errors(across),
        yerr=errors(point.metric, scale),
        fmt=_MARKS.get(point.kind, "o"),
        color=colour,
        ecolor=(colour, 0.35),
        elinewidth=1,
        label=label,
    )


def _make_logarithmic(axes: Any) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([each for each in _TICKS if low <= each <= high], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_exits(axes: Any, task: TaskResult, num_layers: int) -> None:
    """Draws the share of tokens that left after each layer, one bar per policy."""
    layers = sorted(task.full_depth.exits)
    shares = [[100 * point.exits[layer].value for point in task.points] for layer in layers]
    draw_exit_shares(axes, [point.name for point in task.points], layers, shares, num_layers)
    axes.legend(title="left at", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set(title=f"{task.name}: where tokens left")


def _across(point: PointResult, num_layers: int) -> Estimate:
    """Returns the x value: speed-up, or the share of layers saved, in %."""
    if point.speedup is not None:
        return point.speedup
    depth = point.mean_depth
    return Estimate(*(100 * (1 - each / num_layers) for each in (depth.value, depth.high, depth.low)))


def errors(estimate: Estimate, scale: float = 1.0) -> list[list[float]] | None:
    """Returns an error bar of an estimate, as matplotlib takes it; None where the interval is not known."""
    if not all(map(math.isfinite, (estimate.low, estimate.value, estimate.high))):
        return None
    # A percentile interval of few draws may not contain the value.
    return [[scale * max(0.0, estimate.value - estimate.low)], [scale * max(0.0, estimate.high - estimate.value)]]
