"""Pictures of an evaluation, like figures 5 to 9 of EE-Tuning: quality against speed-up, and where tokens left."""

from pathlib import Path
from typing import Any

from ee_tuning.evaluation.bootstrap import Estimate
from ee_tuning.evaluation.figures import Evaluation, PointResult, TaskResult
from ee_tuning.storage.atomic_write import atomic_file

INK, MUTED, CURVE, OTHERS = (
    "#1f2430",
    "#8a90a0",
    "#2f6fde",
    {"fixed": "#c2571a", "speculative": "#1f8a4c", "calibration": "#8a3ffc"},
)
_MARKS = {"fixed": "s", "speculative": "D", "calibration": "^"}
_LABEL_HEIGHTS = (8, -15, 20, -27)
"""Label offsets in points: neighbours alternate, so that labels of similar policies do not overlap."""

_LEGEND = {"threshold": "by threshold", "fixed": "at one exit (its layer)", "speculative": "speculative"}
_WIDE = 3.0
"""Speed-up above which the axis is logarithmic, since fixed exits would squeeze all other points together."""

NAMES = {
    "exact": "exact answers, %",
    "contains": "answers contained, %",
    "rouge-l": "ROUGE-L, %",
    "choice": "right choices, %",
    "perplexity": "perplexity (lower is better)",
}


def draw_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Draws two PNGs per task and returns their paths. Raises InputError where one can not be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    style: Any = {
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "#ffffff",
    }
    with plt.rc_context(style):
        for task in found.tasks:
            height = 0.9 + 0.42 * (len(task.points) + 2)
            for name, size, draw in (("quality", (8, 5), draw_quality), ("exits", (8, height), draw_exits)):
                figure, axes = plt.subplots(figsize=size, constrained_layout=True)
                draw(axes, task, found.num_layers)
                paths.append(folder / f"{name}-{task.name}.png")
                with atomic_file(paths[-1]) as temporary:
                    figure.savefig(temporary, dpi=110, format="png")
                plt.close(figure)
    return paths


def draw_quality(axes: Any, task: TaskResult, num_layers: int) -> None:
    """Draws quality against speed-up, or against depth where nothing was timed, with intervals in both directions."""
    full, scale = task.full_depth, 1.0 if task.metric == "perplexity" else 100.0
    axes.axhspan(scale * full.metric.low, scale * full.metric.high, color=MUTED, alpha=0.12, linewidth=0)
    axes.axhline(
        scale * full.metric.value, color=MUTED, linewidth=1, linestyle="--", label="full depth, and its interval"
    )
    axes.plot(
        _across(full, num_layers).value,
        scale * full.metric.value,
        "o",
        color=MUTED,
        markerfacecolor="none",
        markersize=10,
    )
    if full.speedup is not None:
        axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=":")
    curve = [point for point in task.points if point.kind == "threshold"]
    axes.plot(
        [_across(point, num_layers).value for point in curve],
        [scale * point.metric.value for point in curve],
        "-",
        color=CURVE,
        linewidth=1.2,
    )
    named = set[str]()
    for number, point in enumerate(task.points[1:]):
        colour, label = (
            OTHERS.get(point.kind, CURVE),
            point.name if point.kind == "calibration" else _LEGEND[point.kind],
        )
        across, up = _across(point, num_layers), point.metric
        axes.errorbar(
            across.value,
            scale * up.value,
            xerr=_errors(across),
            yerr=_errors(up, scale),
            fmt=_MARKS.get(point.kind, "o"),
            color=colour,
            ecolor=(colour, 0.35),
            elinewidth=1,
            label=None if label in named else label,
        )
        named.add(label)
        if point.value is not None:
            axes.annotate(
                f"{point.value:g}",
                (across.value, scale * up.value),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                xytext=(0, _LABEL_HEIGHTS[number % len(_LABEL_HEIGHTS)]),
            )
    axes.margins(0.08, 0.12)
    if full.speedup is not None and max(_across(point, num_layers).value for point in task.points) > _WIDE:
        ticks = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([each for each in ticks if low <= each <= high], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9, loc="best")
    axes.set(
        title=f"{task.name}: {task.num_prompts} prompts, 95% intervals",
        ylabel=NAMES[task.metric],
        xlabel="speed-up over full depth, same run"
        if full.speedup is not None
        else "layers saved per token, % (nothing is timed)",
    )


def draw_exits(axes: Any, task: TaskResult, num_layers: int) -> None:
    """Draws the share of tokens that left after each layer, one bar per policy."""
    import matplotlib

    points, layers = task.points, sorted(task.full_depth.exits)
    left, shades = [0.0] * len(points), matplotlib.colormaps["YlGnBu"]
    for i, layer in enumerate(layers):
        shares = [100 * point.exits[layer].value for point in points]
        name = "the end" if layer == num_layers else f"layer {layer}"
        axes.barh(
            range(len(points)), shares, left=left, color=shades(0.25 + 0.65 * i / max(len(layers) - 1, 1)), label=name
        )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(points)), [point.name for point in points])
    axes.invert_yaxis()
    axes.legend(title="left at", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set(title=f"{task.name}: where tokens left", xlabel="share of tokens, %", xlim=(0, 100))


def _across(point: PointResult, num_layers: int) -> Estimate:
    """Returns the x value: speed-up, or the share of layers saved, in %."""
    if point.speedup is not None:
        return point.speedup
    depth = point.mean_depth
    return Estimate(*(100 * (1 - each / num_layers) for each in (depth.value, depth.high, depth.low)))


def _errors(estimate: Estimate, scale: float = 1.0) -> list[list[float]]:
    # A percentile interval of few draws may not contain the value.
    return [[scale * max(0.0, estimate.value - estimate.low)], [scale * max(0.0, estimate.high - estimate.value)]]
