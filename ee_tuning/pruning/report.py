"""The report of `ee-tuning prune` before it writes anything: a table, JSON, and the card of the pruned model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ee_tuning.checkpoint.model_card import TRANSFORMERS_LINES, front_matter
from ee_tuning.pruning.choice import Layers, Measure, in_words
from ee_tuning.text_table import table_lines

MEASURE_WORDS: dict[Measure, str] = {
    "angular": "the block whose input and output are nearest by angle (arXiv 2403.17887)",
    "block-influence": "the layers of least block influence (arXiv 2403.03853)",
    "perplexity": "the block without which a text's loss is least",
    "deepest": "the deepest but the last (arXiv 2403.17887, the simple rule)",
}


@dataclass(frozen=True)
class PruningRow:
    """A number of layers, and the layers that a rule leaves out."""

    layers: Layers
    loss: float
    """Mean loss without them, in nats per token."""


@dataclass(frozen=True)
class PruningReport:
    """Results of the measurements, and the layers chosen by them."""

    model_name: str
    num_layers: int
    measure: Measure
    chosen: PruningRow
    """The layers to leave out."""
    is_listed: bool
    """Whether the user named them."""
    full_loss: float
    """Mean loss of the whole model."""
    rows: Sequence[PruningRow]
    """The layers that `measure` leaves out: one, two, …"""
    deepest: Sequence[PruningRow]
    """The layers that the simple rule leaves out, likewise."""
    num_tokens: int
    """Number of tokens of the losses."""
    num_parameters: tuple[int, int]
    """Parameters of the whole model and of the pruned one."""

    def lines(self) -> list[str]:
        """Returns the table and a conclusion."""
        is_simple = self.measure == "deepest"
        head = ["dropped", "deepest but the last" if is_simple else f"by {self.measure}", "loss", "perplexity"]
        table = [["0", "", *_figures(self.full_loss), "", f"{self.full_loss:.4f}"]]
        for count, (row, other) in enumerate(zip(self.rows, self.deepest, strict=True), 1):
            simple = [in_words(other.layers), f"{other.loss:.4f}"]
            table.append([str(count), in_words(row.layers), *_figures(row.loss), *simple])
        if is_simple:
            lines = table_lines(head, [row[:4] for row in table])
        else:
            lines = table_lines([*head, "deepest but the last", "loss"], table)
        lines = [
            line + "  <" * (place > 1 and self.rows[place - 2].layers == self.chosen.layers)
            for place, line in enumerate(lines)
        ]
        return [*lines, *self._summary()]

    def _summary(self) -> list[str]:
        whole, left = self.num_parameters
        count = len(self.chosen.layers)
        how = "as given" if self.is_listed else f"by {self.measure}"
        return [
            f"mean loss in nats over {self.num_tokens:,} tokens that no layer was chosen by",
            f"drops {'layers' if count > 1 else 'layer'} {in_words(self.chosen.layers)} of {self.num_layers}, {how}: loss "
            f"{self.full_loss:.4f} -> {self.chosen.loss:.4f}, perplexity {_perplexity(self.full_loss)} -> "
            f"{_perplexity(self.chosen.loss)}, {whole:,} -> {left:,} parameters ({1 - left / whole:.1%} fewer)",
        ]

    def tree(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return {
            "model": self.model_name,
            "num_layers": self.num_layers,
            "measure": None if self.is_listed else self.measure,
            "tokens": self.num_tokens,
            "loss": self.full_loss,
            "dropped": self.chosen.layers,
            "dropped_loss": self.chosen.loss,
            "parameters": self.num_parameters,
            "rows": [{"layers": row.layers, "loss": row.loss} for row in self.rows],
            "deepest_but_last": [{"layers": row.layers, "loss": row.loss} for row in self.deepest],
        }


def _figures(loss: float) -> list[str]:
    return [f"{loss:.4f}", _perplexity(loss)]


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 20 else f"e^{loss:.1f}"


def pruning_card(report: PruningReport, family: str, exits: Mapping[int, int], model_format: str) -> str:
    """Returns README.md of the pruned model; `exits` maps old exit layers to new ones where exits go along."""
    name = " ".join(report.model_name.split())
    dropped, count = in_words(report.chosen.layers), len(report.chosen.layers)
    how = "named by hand" if report.is_listed else f"chosen as {MEASURE_WORDS[report.measure]}"
    lines = [
        *front_matter(name, "transformers" if model_format == "hf" else "megatron-core", "pruned"),
        f"# {name} without {'layers' if count > 1 else 'layer'} {dropped}",
        "",
        f"A plain `{family}` of {report.num_layers - count} layers: the {report.num_layers} of {name} but "
        f"{dropped}, {how}. Every tensor is {name}'s own; nothing was tuned for the cut. `ee-tuning prune` made it.",
        "",
        f"| | layers | loss (nats per token, {report.num_tokens:,} tokens) | perplexity |",
        "|---|---|---|---|",
        f"| {name} | {report.num_layers} | {report.full_loss:.4f} | {_perplexity(report.full_loss)} |",
        f"| this model | {report.num_layers - count} | {report.chosen.loss:.4f} | {_perplexity(report.chosen.loss)} |",
        "",
        "It is weaker than the whole model, at generating and reasoning most of all: measure it on your tasks.",
        "",
    ]
    if exits:
        moves = ", ".join(f"{old} → {new}" for old, new in exits.items())
        lines += [f"{name}'s exit heads went along into a folder of their own (layer there → here): {moves}.", ""]
    if model_format == "hf":
        lines += [
            *TRANSFORMERS_LINES,
            "",
        ]
    return "\n".join(lines)
