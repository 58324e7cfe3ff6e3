"""One micro-batch through this stage: receive, frozen layers, send on; then the losses of the exits here.

Nothing waits for a later stage: hidden states leave before the first loss is computed.
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.data.loader import Batch
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.relay import Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.tuning.loss import linear_cross_entropy
from ee_tuning.tuning.optimizer import ExitOptimizer

# s sequence · b micro-batch · h hidden · v/tp this rank's shard of the vocabulary


class Passed(NamedTuple):
    """What a micro-batch left on this stage."""

    exit_inputs: dict[int, ExitInput]
    more: bool
    """Whether another micro-batch follows in the run."""


class StageWalk:
    """This stage's part in the forward-only relay."""

    def __init__(self, model: EarlyExitModel, relay: Relay, topology: Topology, loss_chunk_tokens: int) -> None:
        self._model, self._relay, self._topology = model, relay, topology
        self._project = partial(linear_cross_entropy, vocab=model.vocab, chunk_tokens=loss_chunk_tokens)

    def forward(self, batch: Batch, more: bool, *, ahead: bool = True) -> Passed:
        """Through the frozen layers and on. `more` is the first stage's to say; the others pass on what they hear.

        `ahead` is as in `Relay.receive`: False for the last micro-batch before a checkpoint.
        """
        documents = PackedDocuments.of(batch.document_ids, batch.position_ids, self._topology.device)
        if self._topology.is_first_stage:
            hidden = self._model.embed(batch.tokens.to(self._topology.device), documents)
        else:
            hidden, more = self._relay.receive(ahead=ahead)
        hidden, exit_inputs = self._model.run_layers(hidden, documents)
        if not self._topology.is_last_stage:
            self._relay.send(hidden, more=more)
        return Passed(exit_inputs, more)

    def train(self, batch: Batch, exit_inputs: dict[int, ExitInput], exits: list[ExitOptimizer], is_last: bool) -> dict[int, Tensor]:
        """Forward and at once backward of each exit; gradients add up. Summed losses, by exit layer, in nats."""
        losses, project = {}, self._projection(batch)
        for each in exits:
            each.begin_microbatch(is_last)
            loss = each.head(exit_inputs[each.layer], project)
            loss.backward()
            losses[each.layer] = loss.detach()
        return losses

    @torch.no_grad()
    def evaluate(self, batch: Batch, exit_inputs: dict[int, ExitInput], exits: list[ExitOptimizer]) -> dict[int, Tensor]:
        """Summed losses, by exit layer, in nats, without a gradient."""
        project = self._projection(batch)
        return {each.layer: each.head(exit_inputs[each.layer], project) for each in exits}

    def _projection(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        # One copy to the device serves every exit.
        labels, loss_mask = batch.labels.to(self._topology.device), batch.loss_mask.to(self._topology.device)

        def project(hidden: Tensor, weight: Tensor) -> Tensor:  # [s, b, h], [v/tp, h] -> scalar
            return self._project(hidden, weight, labels, loss_mask)
        return project
