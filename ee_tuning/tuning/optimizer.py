"""An optimizer for each exit head: sharded over data-parallel replicas, clipped and stepped independently of the
others.

Weights compute in the backbone's dtype; master weights, sums of gradients and Adam's moments are float32 (float64 for a
float64 backbone). Gradients of summed losses are added up over micro-batches and replicas, and divided once by the
tokens of the global batch, so every number of replicas takes the same step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ee_tuning.artifact.exit_names import is_replicated
from ee_tuning.config import TuningSection
from ee_tuning.losses.loss_metrics import SUMS, Divisor, LossSums, Means, mean_metrics
from ee_tuning.model.cast import cast_parameters
from ee_tuning.model.exit_head import ExitHead
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology


@dataclass(frozen=True)
class ExitUpdate:
    """The result of one step for one exit."""

    mean_metrics: Means
    """Means over the global batch, before the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    is_skipped: bool
    """Whether the exit was left unchanged, because its gradient is not finite or above tuning.skip_grad_norm."""


class ExitOptimizer:
    """One exit head and its AdamW. `loss_weight` 0 freezes the head."""

    def __init__(self, head: ExitHead, loss_weight: float, tuning: TuningSection, topology: Topology):
        self.layer = head.exit_layer
        self.loss_weight = loss_weight
        self._clip = tuning.clip_grad
        self._device = topology.device
        self._largest_norm = tuning.skip_grad_norm or math.inf
        dtype = next(head.parameters()).dtype
        master = torch.promote_types(dtype, torch.float32)
        cast_parameters(head, master)
        self.head, self._sharded = head, _shard(head, dtype, master, topology.dp_mesh)
        # Read now: during and after a forward pass the module holds whole copies in the computing dtype.
        self.parameters: dict[str, nn.Parameter] = dict(head.named_parameters())
        self._replicated = {
            name for name in self.parameters if is_replicated(head.spec, name, head.config, topology.tp)
        }
        # Where the sequence is cut, a rank has the gradient of its own tokens only.
        self._partial = (
            [
                name
                for name in self.parameters
                if name in (self._replicated if head.cuts_sequence else head.partial_gradients)
            ]
            if topology.tp > 1
            else []
        )
        self.adam = adamw(self.parameters.values(), tuning, topology.device)

    @property
    def trains(self) -> bool:
        """Whether this exit is trained, and not frozen."""
        return self.loss_weight > 0

    @property
    def num_updates(self) -> int:
        """Number of updates, former runs of a resumed run included. Skipped steps do not count."""
        return int(self.adam.state[next(iter(self.parameters.values()))]["step"])

    def begin_microbatch(self, is_last: bool) -> None:
        """Prepares a forward pass with a backward pass. Gradients are reduced only if `is_last` of the step."""
        self._sharded.set_requires_gradient_sync(is_last)
        self._sharded.set_reshard_after_backward(is_last)

    def reshard(self) -> None:
        """Frees the whole weights after forward passes without a gradient. The next step would leave them stale."""
        self._sharded.reshard()

    def sum_partial_gradients(self, topology: Topology) -> None:
        """Sums, over tensor-parallel ranks, the gradients of replicated parameters to which each rank contributes a
        part.

        The sum over replicas is fully_shard's.
        """
        shares = [_gradient(self.parameters[name]) for name in self._partial]
        flat = torch.cat([share.flatten() for share in shares]) if shares else None
        # One of many replicas may hold no row of a parameter; then its tensor-parallel peers hold none either.
        if flat is None or not flat.numel():
            return
        dist.all_reduce(flat, group=topology.tp_group)
        for share, summed in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
            share.copy_(summed.view_as(share))

    def square_sums(self) -> tuple[Tensor, Tensor]:
        """Returns the squared norm of this rank's part of the gradient: of parameters cut over tensor parallelism, and
        of replicated ones.
        """
        cut = torch.zeros((), dtype=torch.float64, device=self._device)
        replicated = torch.zeros_like(cut)
        for name, parameter in self.parameters.items():
            total = replicated if name in self._replicated else cut
            total += _gradient(parameter).square().sum(dtype=torch.float64)
        return cut, replicated

    def update(self, square_sum: float, scale: float, lr: float) -> tuple[float, bool]:
        """Scales the gradient, clips and steps, unless the gradient is implausible or comes from no token.

        Returns the gradient's norm before clipping, and whether the step was taken.
        """
        norm = math.sqrt(square_sum) * scale if square_sum >= 0 else math.nan
        is_believed = math.isfinite(norm) and norm <= self._largest_norm
        if is_believed and scale:
            if self._clip:
                scale *= min(1.0, self._clip / (norm + 1e-6))
            torch._foreach_mul_([_gradient(parameter) for parameter in self.parameters.values()], scale)
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        self.adam.zero_grad()
        return norm, is_believed


def adamw(parameters: Iterable[nn.Parameter], tuning: TuningSection, device: torch.device) -> torch.optim.AdamW:
    """Returns the AdamW of at least one parameter, with weight decay for matrices only.

    Its moments exist before the first step, so that a checkpoint always has the same tensors.
    """
    listed = list(parameters)
    decayed, others = [p for p in listed if p.dim() > 1], [p for p in listed if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": tuning.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=tuning.lr,
        eps=tuning.adam_eps,
        betas=(tuning.adam_beta1, tuning.adam_beta2),
        fused=True,
    )
    for parameter in listed:
        adam.state[parameter] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam


@part("optimizer")
def update_exits(
    exits: list[ExitOptimizer], sums: LossSums, divisor: Divisor, lr: float, ramp: float, topology: Topology
) -> dict[int, ExitUpdate]:
    """Takes one optimizer step of each of this stage's trained `exits`, whose weights are multiplied by `ramp`.

    `sums` are this replica's. All ranks decide on sums over all replicas and shards, so they decide alike.
    """
    counts: list[Tensor] = []
    for each in exits:
        each.sum_partial_gradients(topology)
        counts.append(torch.cat((sums.by_layer[each.layer], torch.stack(each.square_sums()))))
    values = torch.stack(counts)
    if topology.tp_rank != 0:  # replicated on every shard, so counted once
        values[:, :-2] = 0.0
        values[:, -1] = 0.0
    for size, group in ((topology.dp, topology.dp_group), (topology.tp, topology.tp_group)):
        if size > 1:
            dist.all_reduce(values, group=group)
    updates = {}
    for each, (*own_sums, cut, replicated) in zip(exits, values.tolist(), strict=True):
        total = dict(zip(SUMS, own_sums, strict=True))[divisor]
        square_sum = cut + replicated if math.isfinite(own_sums[0]) else math.nan
        norm, is_believed = each.update(square_sum, each.loss_weight * ramp / total if total else 0.0, lr)
        updates[each.layer] = ExitUpdate(mean_metrics(own_sums, divisor), norm, not is_believed or not total)
    return updates


def _shard(head: ExitHead, dtype: torch.dtype, master: torch.dtype, mesh: DeviceMesh) -> FSDPModule:
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != master else None, reduce_dtype=master, cast_forward_inputs=False
    )
    # The backward pass follows at once.
    sharded = fully_shard(head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    sharded.set_gradient_divide_factor(1.0)  # sums, not means
    sharded.set_force_sum_reduction_for_comms(True)  # otherwise the factor goes into an operation that gloo lacks
    return sharded


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert isinstance(gradient, DTensor)
    return gradient.to_local()
