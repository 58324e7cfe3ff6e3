"""Sums over micro-batches, replicas and tokens, and the reported means, per exit."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.losses.drafting import draft_metrics, is_draft_metric
from ee_tuning.losses.loss import STATISTICS, ExitLoss
from ee_tuning.losses.objective import THRESHOLDS
from ee_tuning.parallel.topology import Topology

Divisor = Literal["tokens", "weights"]
"""The denominator of the mean loss: the number of unmasked tokens, or the sum of their weights."""
SUMS = ("loss", *STATISTICS)
"""Names of the sums."""
Means = dict[str, float]
"""`loss`, `perplexity` and the STATISTICS, per unmasked token."""


class LossSums:
    """The sums of this replica, by exit layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor] = {}
        """[len(SUMS)] float64 each, on the device, and behind them the counts of drafts where a drafting head is
        judged.
        """

    def add(self, losses: dict[int, ExitLoss]) -> None:
        """Adds the sums of a micro-batch."""
        for layer, each in losses.items():
            drafts = each.statistics.new_empty(0) if each.drafts is None else each.drafts
            values = torch.cat((each.loss[None], each.statistics, drafts)).double()
            self.by_layer[layer] = self.by_layer[layer] + values if layer in self.by_layer else values

    def only(self, layers: Sequence[int], device: torch.device) -> "LossSums":
        """Returns the sums of `layers`, in this order; zeros for those of which no micro-batch had a loss."""
        found, none = LossSums(), torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        found.by_layer = {layer: self.by_layer.get(layer, none) for layer in layers}
        return found

    def mean_metrics(self, topology: Topology, divisor: Divisor) -> dict[int, Means]:
        """Returns the means over all replicas. All replicas call it."""
        if not self.by_layer:
            return {}
        stacked = torch.stack(list(self.by_layer.values()))
        if topology.dp > 1:
            dist.all_reduce(stacked, group=topology.dp_group)
        return {
            layer: mean_metrics(values, divisor) for layer, values in zip(self.by_layer, stacked.tolist(), strict=True)
        }


def mean_metrics(sums: Sequence[float], divisor: Divisor) -> Means:
    """Returns means from the SUMS of all replicas, and from the draft counts after them, if any. NaN where there was no
    token.
    """
    named = dict(zip(SUMS, sums[: len(SUMS)], strict=True))
    found = {name: _ratio(value, named[divisor if name == "loss" else "tokens"]) for name, value in named.items()}
    nats = found["cross_entropy"]
    perplexity = math.exp(nats) if nats < 700 else math.inf if nats >= 700 else math.nan
    return {**found, "perplexity": perplexity, **draft_metrics(sums[len(SUMS) :])}


def training_figures(by_layer: dict[int, Means], has_teacher: bool) -> dict[str, dict[str, float]]:
    """Returns the figures of each exit in the record of a training step."""
    names = ["loss", "perplexity", "confidence"] + ["forward_kl", "total_variation"] * has_teacher
    return {name: {str(layer): each[name] for layer, each in by_layer.items()} for name in names}


def validation_figures(by_layer: dict[int, Means], has_teacher: bool) -> dict[str, dict[str, float]]:
    """Returns the figures of each exit in a validation record.

    These include the shares of tokens above each confidence and, with a teacher, the share that agrees with it.
    `acceptance` is the share of the exit's drafts that speculative sampling would accept: one minus the total
    variation. Metrics of a drafting head are means over its steps; `draft_metrics` adds acceptance by draft position.
    """
    names = ["loss", "perplexity", "confidence", *(f"above_{threshold}" for threshold in THRESHOLDS)]
    figures: dict[str, Any] = {name: {str(layer): each[name] for layer, each in by_layer.items()} for name in names}
    if has_teacher:
        figures |= {
            name: {str(layer): each[name] for layer, each in by_layer.items()} for name in ("forward_kl", "agreement")
        }
        figures["acceptance"] = {str(layer): 1 - each["total_variation"] for layer, each in by_layer.items()}
        for layer, each in by_layer.items():
            for name in filter(is_draft_metric, each):
                figures.setdefault(name, {})[str(layer)] = each[name]
    return figures


def _ratio(value: float, total: float) -> float:
    return value / total if total else math.nan
