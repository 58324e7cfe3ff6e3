"""The picture of `ee-tuning prune`: loss by number of layers left out, with the layers themselves."""

from pathlib import Path
from typing import Any

from ee_tuning.pictures import CURVE, MUTED, picture
from ee_tuning.pruning.report import PruningReport

MARK = "#d5582b"


def draw_pruning(report: PruningReport, output: Path) -> None:
    """Draws `report`. Raises InputError where `output` can not be written."""
    title = f"{report.model_name} with fewer layers, on {report.num_tokens:,} tokens"
    with picture(output, columns=2, size=(11, 4.4), title=title) as (loss, which):
        if report.measure != "deepest":
            _draw_losses(loss, report, [row.loss for row in report.deepest], "deepest but the last", MUTED)
        name = "deepest but the last" if report.measure == "deepest" else f"by {report.measure}"
        _draw_losses(loss, report, [row.loss for row in report.rows], name, CURVE)
        count = len(report.chosen.layers)
        loss.plot([count], [report.chosen.loss], "D", color=MARK, markersize=9, label="dropped", zorder=3)
        loss.set(title="Loss without them", xlabel="layers dropped", ylabel="nats per token")
        loss.legend(frameon=False)
        for place, row in enumerate(report.rows, 1):
            which.plot([place] * place, row.layers, "s", color=CURVE, markersize=4)
        which.plot([count] * count, report.chosen.layers, "D", color=MARK, markersize=5)
        which.set(
            title=f"Which of the {report.num_layers} go, {name}",
            xlabel="layers dropped",
            ylabel="layer",
            ylim=(0, report.num_layers + 1),
        )


def _draw_losses(axes: Any, report: PruningReport, losses: list[float], label: str, colour: str) -> None:
    axes.plot(range(len(losses) + 1), [report.full_loss, *losses], "-o", color=colour, markersize=4, label=label)
