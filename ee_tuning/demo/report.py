"""One picture of a demo: quality against speed, where tokens left, and loss per exit before and after tuning."""

from pathlib import Path
from typing import Any

BACKGROUND, INK, MUTED = "#ffffff", "#1f2430", "#8a90a0"
LABEL_HEIGHTS = (8, -15, 20, -27)
"""Label offsets in points: neighbours alternate, so that labels of similar thresholds do not overlap."""
BEFORE, AFTER, CURVE = "#c9ced9", "#2f6fde", "#2f6fde"


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Draws `report` (the content of report.json) as a PNG of three panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": BACKGROUND,
        }
    )
    figure, (speed, exits, loss) = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    _draw_quality_against_speed(speed, report)
    _draw_where_tokens_left(exits, report)
    _draw_losses(loss, report)
    figure.suptitle(
        f"{report['model']}: early exits after layers {', '.join(map(str, report['exit_layers']))} "
        f"of {report['num_layers']}",
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(row: dict[str, Any]) -> str:
    return row["name"] if row["threshold"] is None else f"{row['threshold']:g}"


def _draw_quality_against_speed(axes: Any, report: dict[str, Any]) -> None:
    rows = report["thresholds"]
    axes.plot([row["speedup"] for row in rows], [100 * row["agreement"] for row in rows], "-o", color=CURVE)
    for i, row in enumerate(rows):
        axes.annotate(
            _label(row),
            (row["speedup"], 100 * row["agreement"]),
            textcoords="offset points",
            xytext=(0, LABEL_HEIGHTS[i % len(LABEL_HEIGHTS)]),
            ha="center",
            fontsize=9,
        )
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=":")
    axes.margins(0.1, 0.15)
    axes.set(
        title="Quality against speed, by threshold",
        xlabel="speed-up over full depth, same run",
        ylabel="tokens the full model agrees with, %",
    )


def _draw_where_tokens_left(axes: Any, report: dict[str, Any]) -> None:
    import matplotlib

    rows, layers = report["thresholds"], [*report["exit_layers"], report["num_layers"]]
    layers = sorted(set(layers))
    left = [0.0] * len(rows)
    shades = matplotlib.colormaps["YlGnBu"]
    for i, layer in enumerate(layers):
        shares = [100 * row["exit_histogram"].get(str(layer), 0) / sum(row["exit_histogram"].values()) for row in rows]
        name = "the end" if layer == report["num_layers"] else f"layer {layer}"
        axes.barh(
            range(len(rows)), shares, left=left, color=shades(0.25 + 0.65 * i / max(len(layers) - 1, 1)), label=name
        )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.legend(title="left at", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(layers), frameon=False)
    axes.set(title="Where tokens left", xlabel="share of tokens, %", ylabel="threshold", xlim=(0, 100))


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    layers = list(report["exit_loss_before"])
    places = range(len(layers))
    before, after = report["exit_loss_before"], report["exit_loss_after"]
    for offset, losses, colour, name in ((-0.2, before, BEFORE, "before tuning"), (0.2, after, AFTER, "after")):
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
