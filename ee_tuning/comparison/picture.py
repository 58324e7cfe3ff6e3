"""Pictures of a comparison: quality against speed, and quality by depth."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ee_tuning.comparison.rows import BASELINE, Row
from ee_tuning.evaluation.bootstrap import Estimate
from ee_tuning.evaluation.evaluation_picture import NAMES, errors
from ee_tuning.pictures import MUTED, picture

_MARKS = {"fixed": "o", "all_layers": "o", "threshold": "^", "speculative": "D"}
_SIZES = {"threshold": 5, "speculative": 7}
_LARGE = 14
"""Size of a mark that its depth is written in."""
_LOSS = "held-out loss, nats per token (lower is better)"
_COLOURS = ("#2f6fde", "#c2571a", "#1f8a4c", "#8a3ffc", "#b0256b", "#0f8b8d", "#e0912f", "#5c6b8a", "#7a6a2f")
_OFFSETS = ((7, 5), (7, -11), (-7, 7), (-7, -13))
"""Places of labels around their points, in turn."""


def draw_comparison(rows: Sequence[Row], metrics: Mapping[str, str], folder: Path) -> list[Path]:
    """Draws the PNGs and returns their paths: the loss against speed and by depth, and each further task against speed.

    Raises InputError where one can not be written.
    """
    shown = [row for row in rows if row.kind != "failed"]
    if not shown:
        return []
    paths = [folder / "quality-speed.png", folder / "loss-depth.png"]
    with picture(paths[0], size=(9, 5.5)) as (axes,):
        _draw_against_speed(axes, shown, lambda row: row.loss, 1.0, _LOSS)
    with picture(paths[1], size=(9, 5.5)) as (axes,):
        _draw_by_depth(axes, shown)
    for task, metric in metrics.items():
        paths.append(folder / f"task-{task}.png")
        scale, name = 1.0 if metric == "perplexity" else 100.0, f"{task}: {NAMES[metric]}"
        with picture(paths[-1], size=(9, 5.5)) as (axes,):
            _draw_against_speed(axes, shown, partial(_score, task), scale, name)
    return paths


def _score(task: str, row: Row) -> Estimate | None:
    return row.tasks.get(task)


def _draw_against_speed(
    axes: Any, rows: Sequence[Row], quality: Callable[[Row], Estimate | None], scale: float, ylabel: str
) -> None:
    for way, colour in _colours(rows).items():
        is_labelled = False
        for place, row in enumerate(row for row in rows if row.way == way):
            found = quality(row)
            if found is None or row.speedup is None:
                continue
            point = (row.speedup.value, scale * found.value)
            axes.errorbar(
                *point,
                xerr=errors(row.speedup),
                yerr=errors(found, scale),
                fmt=_MARKS.get(row.kind, "o"),
                markersize=_SIZES.get(row.kind, _LARGE),
                color=colour,
                ecolor=(colour, 0.22),
                elinewidth=1,
                label=None if is_labelled else way,
            )
            is_labelled = True
            _label(axes, row, point, place, colour)
    _draw_baseline(axes, rows, quality, scale)
    axes.axvline(1.0, linestyle=":", color=MUTED, linewidth=1)
    axes.margins(0.08, 0.1)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=0.6)
    axes.set(
        title="Quality against speed: at a depth (its layers), by threshold (▲), by speculation (◆)",
        xlabel="tokens per second ÷ those of the whole model, same run",
        ylabel=ylabel,
    )


def _draw_by_depth(axes: Any, rows: Sequence[Row]) -> None:
    for way, colour in _colours(rows).items():
        own = [row for row in rows if row.way == way and row.loss is not None and row.kind != "speculative"]
        for kinds, style in ((("fixed", "all_layers"), "-o"), (("threshold",), ":^")):
            line = sorted((row.read_depth, row.loss.value) for row in own if row.kind in kinds and row.loss is not None)
            if line:
                label = way if kinds[0] == "fixed" else f"{way}, by threshold"
                axes.plot(*zip(*line, strict=True), style, color=colour, label=label, linewidth=1.4, markersize=6)
    _draw_baseline(axes, rows, lambda row: row.loss, 1.0)
    axes.margins(0.06, 0.1)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(title="Loss by depth", xlabel="layers per token", ylabel=_LOSS)


def _draw_baseline(axes: Any, rows: Sequence[Row], quality: Callable[[Row], Estimate | None], scale: float) -> None:
    for row in rows:
        if row.way == BASELINE and (found := quality(row)) is not None:
            axes.axhline(scale * found.value, linestyle="--", color=MUTED, linewidth=1, label="the whole model")


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != BASELINE]
    return {way: _COLOURS[place % len(_COLOURS)] for place, way in enumerate(ways)}


def _label(axes: Any, row: Row, point: tuple[float, float], place: int, colour: str) -> None:
    """Writes the depth into the mark, or the threshold beside it."""
    if row.kind in ("fixed", "all_layers"):
        inside = {"ha": "center", "va": "center", "color": "white", "fontsize": 8, "fontweight": "bold"}
        axes.annotate(f"{row.depth:.0f}", point, zorder=5, **inside)
    elif row.kind == "threshold":
        dx, dy = _OFFSETS[place % len(_OFFSETS)]
        side = "left" if dx > 0 else "right"
        axes.annotate(
            row.name.removeprefix("threshold "),
            point,
            textcoords="offset points",
            xytext=(dx, dy),
            ha=side,
            color=colour,
            fontsize=8,
        )
