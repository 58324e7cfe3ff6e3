"""LoRA (arXiv 2106.09685): low-rank maps beside the frozen linear maps of a stage's layers.

Megatron-core fuses queries, keys and values, and gate and up. Hugging Face's maps, which peft names, are single ones,
so each has a pair of matrices of its own, and their products are arranged as the fused map's output is.
"""

# s sequence, or this rank's part of it where it is cut · b micro-batch · i inputs · o outputs · r rank
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from ee_tuning.model.sequence_parallel import gather_sequence, reduce_scatter_sequence
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.lora_targets import FUSED, ROW_PARALLEL, target_shape
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.tp_autograd import copy_to_tp, reduce_from_tp


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Specification of the low-rank maps that are added to a stage's layers."""

    targets: tuple[str, ...]
    """Those of `lora_targets.TARGETS` that get a pair of matrices."""
    rank: int
    alpha: float
    """The product is multiplied by alpha / rank."""
    seed: int
    dtype: torch.dtype
    cuts_sequence: bool
    """Whether layers take and return each tensor-parallel rank's part of the sequence."""


class LoraPair(nn.Module):
    """B A x. A is drawn uniformly from ±1/√i, the same at every layout, and B is zero, as in peft."""

    def __init__(self, inputs: int, outputs: int, rank: int, **tensor: Any):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, **tensor))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **tensor))

    @torch.no_grad()
    def draw(self, name: str, seed: int, inputs: int, first: int) -> None:
        """Draws A, whose columns begin with column `first` of the whole matrix [r, `inputs`]. `name` is the name of the
        pair.
        """
        key = int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:7])
        whole = torch.rand(self.lora_A.shape[0], inputs, generator=torch.Generator().manual_seed(key))
        part = whole.mul_(2).sub_(1).div_(math.sqrt(inputs))[:, first : first + self.lora_A.shape[1]]
        self.lora_A.copy_(part)


class LoraMaps(nn.Module):
    """The low-rank maps beside one linear map of Megatron-core's, this rank's part of them. Children are named as
    Hugging Face names the maps.
    """

    def __init__(self, names: tuple[str, ...], lora: Lora, config: ModelConfig, topology: Topology):
        super().__init__()
        tp = topology.tp
        self._names, self._scale, self._cuts_sequence = names, lora.alpha / lora.rank, lora.cuts_sequence
        self._group = topology.tp_group if tp > 1 else None
        self._is_row_parallel = names[0] in ROW_PARALLEL
        self._num_groups = config.num_query_groups // tp
        self._widths = [target_shape(name, config)[0] // (1 if self._is_row_parallel else tp) for name in names]
        for name, outputs in zip(names, self._widths, strict=True):
            if name in lora.targets:
                inputs = target_shape(name, config)[1] // (tp if self._is_row_parallel else 1)
                self.add_module(name, LoraPair(inputs, outputs, lora.rank, dtype=lora.dtype, device=topology.device))

    def forward(self, x: Tensor) -> Tensor:  # [s, b, i] -> [s, b, o], as the linear map takes and returns them
        """Returns the addend of the linear map's output."""
        parts = dict(self.named_children())
        products: list[Tensor | None] = []
        for name in self._names:
            pair = parts.get(name)
            products.append(None if pair is None else self._product(pair, x) * self._scale)
        if len(self._names) == 1:
            assert products[0] is not None
            return products[0]
        shown = next(each for each in products if each is not None)
        whole = [
            shown.new_zeros(*shown.shape[:-1], width) if each is None else each
            for each, width in zip(products, self._widths, strict=True)
        ]
        if self._names[0] != "q_proj":
            return torch.cat(whole, dim=-1)
        groups = [each.unflatten(-1, (self._num_groups, -1)) for each in whole]  # per query group its q, k and v
        return torch.cat(groups, dim=-1).flatten(-2)

    def _product(self, pair: Any, x: Tensor) -> Tensor:
        # Ranks exchange the r numbers of a token between the two matrices, instead of its i or o.
        inner = x @ pair.lora_A.t()
        if self._group is not None and self._is_row_parallel:
            reduce = reduce_scatter_sequence if self._cuts_sequence else reduce_from_tp
            inner = reduce(inner, self._group)
        elif self._group is not None:
            inner = gather_sequence(inner, self._group) if self._cuts_sequence else copy_to_tp(inner, self._group)
        return inner @ pair.lora_B.t()


def add_lora(layers: Mapping[int, Any], lora: Lora, config: ModelConfig, topology: Topology) -> None:
    """Adds low-rank maps to `layers`, by number (1-based), as `lora` of their linear maps."""
    for number, layer in layers.items():
        for path, fused in FUSED.items():
            names = fused if config.is_gated or path != "mlp.linear_fc1" else fused[1:]
            if not set(names) & set(lora.targets):
                continue
            maps = LoraMaps(names, lora, config, topology)
            for name, pair in maps.named_children():
                assert isinstance(pair, LoraPair)
                first = topology.tp_rank * pair.lora_A.shape[1] if name in ROW_PARALLEL else 0
                pair.draw(f"{number}.{name}", lora.seed, target_shape(name, config)[1], first)
            linear = layer.get_submodule(path)
            linear.lora = maps
            linear.register_forward_hook(_add)


def _add(linear: Any, arguments: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    out, bias = output
    return out + linear.lora(arguments[0]), bias
