"""AdamW for weights of the model itself, or of LoRA's matrices beside them, over all stages.

Unlike the exits, these weights have one gradient norm over all stages. Each replica keeps its share of the rows of
master weights and moments (ZeRO 1, arXiv 1910.02054): gradients are summed over the replicas, each updates its rows,
and all gather the result. Master weights, sums of gradients and moments are float32 (float64 for a float64 backbone).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ee_tuning.config import TuningSection
from ee_tuning.parallel.stage_copies import StageCopies
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.tensor_slice import Shard
from ee_tuning.tuning.optimizer import adamw

_BUCKET = 2**24
"""Fewest numbers that one collective sums, where there are as many."""


class TrainedRows(NamedTuple):
    """Master weights and moments of some rows, this rank's of a trained parameter, as a checkpoint holds them."""

    plan: Shard
    """The stored tensors' slices that make up this tensor-parallel rank's part of the parameter."""
    first_row: int
    """The first row of that part that this replica holds."""
    tensors: dict[str, Tensor]
    """`master`, `exp_avg` and `exp_avg_sq`: the rows, as views."""
    replica: int
    """This rank's place among the tensor-parallel ranks, and stages, that hold the same rows; 0 writes them."""


@dataclass(frozen=True)
class TrainedParameter:
    """One parameter on this rank."""

    parameter: nn.Parameter
    plan: Callable[[int], Shard]
    """Tensor-parallel rank -> its part of the stored tensors."""
    is_replicated: bool
    """Whether all tensor-parallel ranks hold the same copy."""
    is_partial: bool
    """Whether each of them computes a share of its gradient."""
    copies: StageCopies | None = None
    """The stages that hold copies, each of which has a part of the gradient; None for this stage alone."""

    @property
    def is_first_copy(self) -> bool:
        """Whether this stage counts and writes it."""
        return self.copies is None or self.copies.index == 0


class BackboneOptimizer:
    """The trained weights of this stage, which may have none, and their AdamW."""

    def __init__(self, trained: dict[str, TrainedParameter], tuning: TuningSection, topology: Topology):
        self._trained, self._topology, self._clip = trained, topology, tuning.clip_grad
        self._largest_norm = tuning.skip_grad_norm or math.inf
        self.num_updates = torch.zeros(1, device=topology.device)
        """[1]: updates, those of former runs included. Skipped steps do not count."""
        self._gradients: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        """Parameter -> mask [rows] bool of this replica's rows that are frozen at present, if any."""
        self._masters: dict[str, nn.Parameter] = {}
        for name, each in trained.items():
            each.parameter.requires_grad_()
            rows = each.parameter.detach()[self._own_rows(each.parameter)]
            dtype = torch.promote_types(rows.dtype, torch.float32)
            # A hook that held this optimizer would keep it, and process groups, as long as the process lives: Python's
            # collector does not see what autograd holds.
            each.parameter.register_post_accumulate_grad_hook(partial(_add_gradient, self._gradients, name, dtype))
            self._masters[name] = nn.Parameter(rows.to(dtype, copy=True))
        self._adam = adamw(self._masters.values(), tuning, topology.device) if trained else None

    def choose(self, names: frozenset[str]) -> None:
        """Trains the stored tensors `names` from now on, and freezes the others, with their moments."""
        self._frozen.clear()
        for name, each in self._trained.items():
            plan, own = each.plan(self._topology.tp_rank), self._own_rows(each.parameter)
            is_frozen = torch.zeros(each.parameter.shape[0], dtype=torch.bool, device=each.parameter.device)
            row = 0
            for piece in plan.pieces:
                size = is_frozen.shape[0] if piece.cut_dim == 1 else piece.size
                is_frozen[row : row + size] = piece.name not in names
                row += size
            each.parameter.requires_grad_(not bool(is_frozen.all()))
            if bool(is_frozen.any()):
                self._frozen[name] = is_frozen[own]

    def update(self, num_tokens: float, lr: float) -> tuple[float, bool]:
        """Divides the gradients' sums by the tokens of the global batch, clips, and steps, unless the gradient is
        implausible or comes from no token. All ranks of all stages call it together.

        `num_tokens` are this replica's. Returns the gradient's norm before clipping, and whether the step was left out.
        """
        active = {name: each for name, each in self._trained.items() if each.parameter.requires_grad}
        for name, each in active.items():
            self._gradients.setdefault(name, torch.zeros_like(each.parameter, dtype=self._masters[name].dtype))
        topology = self._topology
        if topology.tp > 1:
            partial_sums = [self._gradients[name] for name, each in active.items() if each.is_partial]
            _sum_in_buckets(partial_sums, topology.tp_group)
        if topology.dp > 1:
            _sum_in_buckets([self._gradients[name] for name in active], topology.dp_group)
        own = {name: self._gradients[name][self._own_rows(each.parameter)] for name, each in active.items()}
        self._sum_over_copies(own)
        for name, is_frozen in self._frozen.items():
            if name in own:
                own[name][is_frozen] = 0.0
        square_sum, total = self._over_all_ranks(own, num_tokens)
        norm = math.sqrt(square_sum) / total if total and square_sum >= 0 else math.nan
        is_skipped = not (math.isfinite(norm) and norm <= self._largest_norm)
        if not is_skipped:
            scale = min(1.0, self._clip / (norm + 1e-6)) / total if self._clip else 1 / total
            self._step(own, scale, lr)
        self._gradients.clear()
        return norm, is_skipped

    def rows(self) -> Iterator[TrainedRows]:
        """Yields this rank's rows of the tensors in a checkpoint, as views."""
        topology = self._topology
        for name, each in self._trained.items():
            assert self._adam is not None
            master, part = self._masters[name], self._own_rows(each.parameter)
            moments = self._adam.state[master]
            copy = 0 if each.copies is None else each.copies.index
            yield TrainedRows(
                plan=each.plan(topology.tp_rank),
                first_row=part.start,
                tensors={"master": master, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]},
                replica=copy * topology.tp + (topology.tp_rank if each.is_replicated else 0),
            )

    def watch_gradients(self, seen: Callable[[Tensor], None]) -> None:
        """Calls `seen` with the sum of a parameter's gradients whenever it has grown, from now on. For dry runs."""
        sums = self._gradients
        for name, each in self._trained.items():
            each.parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen(sums[name]))

    def state_tensors(self) -> Iterator[Tensor]:
        """Yields this rank's master weights and moments."""
        for name in self._masters:
            yield from self._state(name)

    def restore(self, num_updates: Tensor) -> None:
        """Continues from master weights and moments that were overwritten through `rows`."""
        self.num_updates.copy_(num_updates)
        for master in self._masters.values():
            assert self._adam is not None
            self._adam.state[master]["step"].copy_(num_updates.squeeze(0))
        self._publish()

    def whole_masters(self) -> Iterator[tuple[Callable[[int], Shard], Tensor]]:
        """Yields (plan, this tensor-parallel rank's whole part) of each parameter that this stage writes. Replicas
        iterate together.
        """
        for name, each in self._trained.items():
            if not each.is_first_copy:
                continue
            yield each.plan, self._gathered(each.parameter, self._masters[name].detach())

    def _sum_over_copies(self, own: dict[str, Tensor]) -> None:
        """Sums gradients of which other stages hold parts, group by group, in the same order on all of them."""
        shared = {name: each.copies for name, each in self._trained.items() if each.copies is not None and name in own}
        for group in dict.fromkeys(copies.group for copies in shared.values()):
            names = [name for name, copies in shared.items() if copies.group is group]
            names.sort(key=lambda name: self._trained[name].plan(0).pieces[0].name)
            _sum_in_buckets([own[name] for name in names if own[name].numel()], group)

    def _over_all_ranks(self, own: dict[str, Tensor], num_tokens: float) -> tuple[float, float]:
        """Returns the squared norm of the whole gradient's sum, and the tokens of the global batch."""
        topology = self._topology
        counted = [
            gradient.square().sum(dtype=torch.float64)
            for name, gradient in own.items()
            if self._trained[name].is_first_copy and (topology.tp_rank == 0 or not self._trained[name].is_replicated)
        ]
        square = torch.stack(counted).sum().item() if counted else 0.0
        is_counter = topology.is_first_stage and topology.tp_rank == 0
        values = torch.tensor([square, num_tokens if is_counter else 0.0], dtype=torch.float64)
        if topology.world_size > 1:
            dist.all_reduce(values, group=topology.world_control)
        square_sum, total = values.tolist()
        return square_sum, total

    def _step(self, own: dict[str, Tensor], scale: float, lr: float) -> None:
        self.num_updates += 1
        if self._adam is None:
            return
        for name, gradient in own.items():
            self._masters[name].grad = gradient * scale
        for group in self._adam.param_groups:
            group["lr"] = lr
        kept = [
            (tensor, is_frozen, tensor[is_frozen])
            for name, is_frozen in self._frozen.items()
            if name in own
            for tensor in self._state(name)
        ]
        self._adam.step()
        for tensor, is_frozen, rows in kept:
            tensor[is_frozen] = rows
        for state in self._adam.state.values():  # weights that were frozen meanwhile count as many updates
            state["step"].copy_(self.num_updates.squeeze(0))
        self._adam.zero_grad()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copies master weights to the weights that compute, on all replicas."""
        for name, each in self._trained.items():
            each.parameter.copy_(self._gathered(each.parameter, self._masters[name].to(each.parameter.dtype)))

    def _state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        assert self._adam is not None
        moments = self._adam.state[self._masters[name]]
        return self._masters[name].detach(), moments["exp_avg"], moments["exp_avg_sq"]

    def _own_rows(self, parameter: Tensor) -> slice:
        rows, topology = parameter.shape[0], self._topology
        chunk = -(-rows // topology.dp)
        return slice(min(rows, topology.dp_rank * chunk), min(rows, (topology.dp_rank + 1) * chunk))

    def _gathered(self, parameter: Tensor, own: Tensor) -> Tensor:
        """Gathers rows over the replicas."""
        dp = self._topology.dp
        if dp == 1:
            return own
        chunk = -(-parameter.shape[0] // dp)
        padded = own.new_zeros(chunk, *own.shape[1:])
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in range(dp)]
        dist.all_gather(parts, padded, group=self._topology.dp_group)
        return torch.cat(parts)[: parameter.shape[0]]


def _sum_in_buckets(tensors: list[Tensor], group: object) -> None:
    """Sums each tensor over the group, in place, several at a time."""
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        if index + 1 < len(tensors) and sum(each.numel() for each in bucket) < _BUCKET:
            continue
        flat = torch.cat([each.flatten() for each in bucket])
        dist.all_reduce(flat, group=group)
        for each, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(summed.view_as(each))
        bucket = []


def _add_gradient(sums: dict[str, Tensor], name: str, dtype: torch.dtype, parameter: Tensor) -> None:
    """Moves a parameter's gradient to its sum of this step, which has `dtype`."""
    gradient = parameter.grad
    assert gradient is not None
    if name in sums:
        sums[name].add_(gradient)
    else:
        sums[name] = gradient.to(dtype, copy=gradient.dtype != dtype)
    parameter.grad = None
