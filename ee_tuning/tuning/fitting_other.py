"""The row of "any other token" in a shortlist's output matrix, fitted to final states y beside the exits' maps.

Its logit should be o = log Σ exp(w · y) over all unlisted tokens. It is regressed on y with weights p (1 − p), where p
is their share of the probability: to second order this minimizes the divergence from the full model's "is it listed?".
An exit whose map takes its states to y can use the same row behind that map.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.fit import RIDGE
from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.topology import Topology

# n tokens · h hidden


class OtherFit:
    """Sums on the last stage, Σ p (1 − p) y yᵀ and Σ p (1 − p) y o in float64, the same on all tensor-parallel
    ranks.
    """

    def __init__(self, model: EarlyExitModel, token_ids: tuple[int, ...], topology: Topology):
        width = model.config.hidden_size
        self._shortlist, self._topology = Shortlist.of_tokens(token_ids, model.vocab, topology), topology
        self._weight = model.backbone.output_layer.weight
        self._sums = torch.zeros(width, width + 1, dtype=torch.float64, device=topology.device)

    def add(self, final: Tensor, counts: Tensor) -> None:  # [n, h], [n]
        """Adds the tokens whose `counts` is 1."""
        logits = final @ self._weight[: self._shortlist.whole.true_rows].t()
        known = self._shortlist.other_and_total(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        other, total = (each.double() for each in known)
        share, states = (other - total).exp(), final.double()
        self._sums += (states * (counts * share * (1 - share))[:, None]).T @ torch.cat((states, other[:, None]), dim=1)

    def row(self) -> Tensor:  # [h] float64, on the CPU; valid on the writer of the last stage
        """Sums over replicas and solves. All ranks of the last stage call it."""
        topology, sums = self._topology, self._sums.cpu()
        if topology.tp_rank:
            sums.zero_()
        dist.reduce(sums, dst=topology.writer_of_stage(topology.stage), group=topology.stage_control)
        gram, moments = sums[:, :-1].clone(), sums[:, -1:]
        diagonal = gram.diagonal()
        diagonal += RIDGE * diagonal.mean()
        factor, info = torch.linalg.cholesky_ex(gram)
        return torch.cholesky_solve(moments, factor)[:, 0] if not info else torch.full_like(moments[:, 0], torch.nan)
