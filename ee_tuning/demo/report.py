"""Results of a demo: losses before and after tuning, and a picture with quality against speed and where tokens left."""

import json
from pathlib import Path
from typing import Any

from ee_tuning.line_file import read_lines
from ee_tuning.pictures import CURVE, INK, MUTED, PALE, draw_exit_shares, label_point, picture


def validation_losses(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the first and the last validation loss of each exit from a run's metrics.jsonl."""
    records = [json.loads(line) for line in read_lines(metrics)]
    losses = [record["loss"] for record in records if record["kind"] == "validation"]
    return losses[0], losses[-1]


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Draws `report` (the content of report.json) as a PNG of three panels."""
    layers = ", ".join(map(str, report["exit_layers"]))
    title = f"{report['model']}: early exits after layers {layers} of {report['num_layers']}"
    with picture(path, columns=3, size=(15, 4.6), title=title) as (speed, exits, loss):
        _draw_quality_against_speed(speed, report)
        _draw_where_tokens_left(exits, report)
        _draw_losses(loss, report)


def _label(row: dict[str, Any]) -> str:
    return row["name"] if row["threshold"] is None else f"{row['threshold']:g}"


def _draw_quality_against_speed(axes: Any, report: dict[str, Any]) -> None:
    rows = report["thresholds"]
    axes.plot([row["speedup"] for row in rows], [100 * row["agreement"] for row in rows], "-o", color=CURVE)
    for place, row in enumerate(rows):
        label_point(axes, _label(row), (row["speedup"], 100 * row["agreement"]), place)
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=":")
    axes.margins(0.1, 0.15)
    axes.set(
        title="Quality against speed, by threshold",
        xlabel="speed-up over full depth, same run",
        ylabel="tokens the full model agrees with, %",
    )


def _draw_where_tokens_left(axes: Any, report: dict[str, Any]) -> None:
    rows, num_layers = report["thresholds"], report["num_layers"]
    layers = sorted({*report["exit_layers"], num_layers})
    shares = [
        [100 * row["exit_histogram"].get(str(layer), 0) / sum(row["exit_histogram"].values()) for row in rows]
        for layer in layers
    ]
    draw_exit_shares(axes, [_label(row) for row in rows], layers, shares, num_layers)
    axes.legend(title="left at", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(layers), frameon=False)
    axes.set(title="Where tokens left", ylabel="threshold")


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    layers = list(report["exit_loss_before"])
    places = range(len(layers))
    before, after = report["exit_loss_before"], report["exit_loss_after"]
    for offset, losses, colour, name in ((-0.2, before, PALE, "before tuning"), (0.2, after, CURVE, "after")):
        bars = axes.bar(
            [p + offset for p in places], [losses[layer] for layer in layers], 0.38, color=colour, label=name
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    if report.get("final_loss") is not None:
        axes.axhline(report["final_loss"], color=INK, linewidth=1, linestyle="--", label="the full model")
    axes.set_xticks(places, [f"layer {layer}" for layer in layers])
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=9, columnspacing=1)
    axes.set(title="Held-out loss per exit", ylabel="nats per token")
