"""Draws the README's picture: a text with its tokens coloured by exit layer, beside quality against speed.

    python tools/draw_early_exit.py docs/pictures/early_exit.json docs/pictures/early_exit.svg

The first file has figures of `make demo-llm`: the sample answer of its report.json, token by token with the layer that
each left at (thresholds calibrated for 95% agreement), and of its evaluation.json, for each policy, the score relative
to full depth and the speed-up, with 95% intervals.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

INK, MUTED = "#1f2430", "#5b6478"
SHADES = ("#fde3a7", "#a6dba0", "#7fb8e6")
"""Colours behind tokens of the first, second and third exit; tokens of the final head have none."""
LINE = 0.105
"""Height of a line, as a share of the panel's."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws `report` to the SVG file `path`."""
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "svg.hashsalt": "early_exit"})
    figure, (text, speed) = plt.subplots(
        1, 2, figsize=(10.5, 3.8), dpi=72, width_ratios=(1.3, 1), constrained_layout={"w_pad": 0.15}
    )
    draw_speed(speed, report)
    figure.draw_without_rendering()  # fixes the panels' sizes, on which line breaks depend
    draw_text(text, report)
    figure.savefig(path, dpi=72, metadata={"Date": None})
    plt.close(figure)


def draw_text(axes: Axes, report: dict[str, Any]) -> None:
    """Draws the sample answer, broken into lines between words, and a legend."""
    layers = [layer for layer in report["exit_layers"] if layer < report["num_layers"]]
    colours = dict(zip(layers, SHADES, strict=True))
    axes.set_axis_off()
    axes.set_title(f"{report['model']}: where each token leaves", loc="left", fontweight="bold", fontsize=12)
    axes.text(0, 0.97, report["sample"]["prompt"], color=MUTED, style="italic", va="top")
    x, y = 0.0, 0.97 - 1.3 * LINE
    for word in words_of(report["sample"]["parts"]):
        widths = [width(axes, text) for text, _ in word]
        if x + sum(widths) > 1:
            x, y = 0.0, y - LINE
            word = [(text.lstrip() if place == 0 else text, layer) for place, (text, layer) in enumerate(word)]
            widths = [width(axes, text) for text, _ in word]
        for (text, layer), wide in zip(word, widths, strict=True):
            put_token(axes, x, y, wide, text, colours.get(layer))
            x += wide
    left = 0.0
    for layer, colour in [*colours.items(), (report["num_layers"], None)]:
        label = f"after layer {layer}" if colour else f"at the end, layer {layer}"
        axes.add_patch(Rectangle((left, 0.0), 0.03, 0.06, facecolor=colour or "none", edgecolor=MUTED, linewidth=0.8))
        axes.text(left + 0.04, 0.03, label, va="center", fontsize=10)
        left += 0.07 + width(axes, label) * 10 / 11


def words_of(parts: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Returns tokens in groups that begin with a blank: a line may be broken before each group."""
    words: list[list[tuple[str, int]]] = []
    for text, layer in parts:
        if text.startswith(" ") or not words:
            words.append([])
        words[-1].append((text, layer))
    return words


def width(axes: Axes, text: str) -> float:
    """Returns the width of `text`, as a share of the panel's."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Blanks at the ends have no extent.
    drawn = [axes.text(0, 0, shown) for shown in (f"|{text}|", "||")]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    wide, bars = (each.get_window_extent(renderer).width for each in drawn)
    for each in drawn:
        each.remove()
    return (wide - bars) / axes.get_window_extent(renderer).width


def put_token(axes: Axes, x: float, y: float, wide: float, text: str, colour: str | None) -> None:
    blank = wide * (len(text) - len(text.lstrip())) / len(text) if text else 0.0
    if colour is not None:
        axes.add_patch(
            Rectangle((x + 0.6 * blank, y - 0.8 * LINE), wide - 0.6 * blank, 0.84 * LINE, color=colour, lw=0)
        )
    axes.text(x, y - 0.1 * LINE, text, va="top")


def draw_speed(axes: Axes, report: dict[str, Any]) -> None:
    """Draws score against speed-up, a point with its intervals for each policy."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(100, color=MUTED, linewidth=0.8, linestyle=":")
    axes.plot([1], [100], "s", color=MUTED)
    axes.annotate("full depth", (1, 100), xytext=(0, 9), textcoords="offset points", ha="center", color=MUTED)
    for point in report["points"]:
        speedup, score = point["speedup"], point["relative"]
        axes.errorbar(
            speedup["value"],
            100 * score["value"],
            xerr=[[speedup["value"] - speedup["low"]], [speedup["high"] - speedup["value"]]],
            yerr=[[100 * (score["value"] - score["low"])], [100 * (score["high"] - score["value"])]],
            fmt="o",
            color="#2f6fde",
            ecolor="#9db8ec",
            capsize=3,
        )
        axes.annotate(
            point["name"],
            (speedup["value"], 100 * score["value"]),
            xytext=point["label_at"],
            textcoords="offset points",
            ha="right" if point["label_at"][0] < 0 else "left",
        )
    axes.set_title("Quality against speed, 95% intervals", loc="left", fontweight="bold", fontsize=12)
    axes.set(
        xlabel="decoding speed, full depth = 1",
        ylabel="score on held-out questions,\n% of full depth's",
        xlim=(0.97, 1.15),
        ylim=(76, 105),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()
