"""Frozen linear maps with weights in 8 or 4 bits: int8 by torchao, NF4 (QLoRA, arXiv 2305.14314) by bitsandbytes.

They replace Megatron-core's column- and row-parallel maps in the backbone's layers. Backward, weights are dequantized
for the gradient of the inputs; they have none themselves.
"""

import abc
import functools
import importlib.util
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ee_tuning.config import WeightFormat
from ee_tuning.errors import InputError
from ee_tuning.model.sequence_parallel import gather_sequence, reduce_scatter_sequence
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.tp_autograd import copy_to_tp, reduce_from_tp

with importing_megatron():
    from megatron.core.tensor_parallel.layers import RowParallelLinear

# s sequence · b micro-batch · i inputs of this rank · o outputs of this rank

NF4_BLOCK = 64
"""Number of neighbouring weights of a row that share a scale, their absolute maximum."""
_LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_weight_format(weights: WeightFormat, config: ModelConfig) -> None:
    """Raises InputError where the model's weights can not be quantized in this way, or the library for it is not
    installed.
    """
    if weights == "native":
        return
    if config.num_experts:
        raise InputError(
            f"tuning.backbone_weights = {weights} is for models without experts, and this one has {config.num_experts}; "
            "leave it native"
        )
    library = _LIBRARIES[weights]
    if importlib.util.find_spec(library) is None:
        raise InputError(
            f"tuning.backbone_weights = {weights} needs {library}, which is not installed; pip install 'ee_tuning[quantize]', "
            "or leave it native"
        )


def quantize_layer(layer: nn.Module, weights: Literal["int8", "nf4"], topology: Topology) -> None:
    """Replaces each linear map of a Megatron layer by a QuantizedLinear, whose weight is to be set by `quantize_`."""
    kind = {"int8": Int8Linear, "nf4": NF4Linear}[weights]
    for part, names in (
        (layer.self_attention, ("linear_qkv", "linear_proj")),
        (layer.mlp, ("linear_fc1", "linear_fc2")),
    ):
        for name in names:
            setattr(part, name, kind(getattr(part, name), topology))


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, "QuantizedLinear"]]:
    """Yields Megatron-core's name of the weight, and the linear map that holds it."""
    return ((f"{name}.weight", each) for name, each in module.named_modules() if isinstance(each, QuantizedLinear))


class QuantizedLinear(nn.Module, abc.ABC):
    """Replaces Megatron's `stock` map: [s, b, i] -> [s, b, o], and the bias where the caller adds it.

    Where the sequence is cut, column-parallel maps take [s/tp, b, i], and row-parallel ones return [s/tp, b, o].
    """

    def __init__(self, stock: Any, topology: Topology):
        super().__init__()
        self.shape, self.dtype = tuple(stock.weight.shape), stock.weight.dtype  # [o, i]
        # Neither library supports float64.
        self.library_dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        self.bias, self.leaves_bias = stock.bias, stock.skip_bias_add
        self.is_row_parallel, self.cuts_sequence = isinstance(stock, RowParallelLinear), stock.sequence_parallel
        self.group = topology.tp_group if topology.tp > 1 else None
        for name, shape, dtype in self.buffers_of(*self.shape):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=topology.device), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.group is not None and not self.is_row_parallel:
            x = gather_sequence(x, self.group) if self.cuts_sequence else copy_to_tp(x, self.group)
        out: Tensor = _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.product(x)
        if self.group is not None and self.is_row_parallel:
            out = reduce_scatter_sequence(out, self.group) if self.cuts_sequence else reduce_from_tp(out, self.group)
        if self.bias is not None and not self.leaves_bias:
            out = out + self.bias
        return out, self.bias if self.leaves_bias else None

    @staticmethod
    @abc.abstractmethod
    def buffers_of(outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Yields name, shape and dtype of the buffers for a weight [outputs, inputs]."""

    @abc.abstractmethod
    def quantize_(self, weight: Tensor) -> None:  # [o, i]
        """Quantizes this rank's part of the weight into the buffers. All ranks of a tensor-parallel group call it
        together.
        """

    @abc.abstractmethod
    def dequantized(self) -> Tensor:  # [o, i]
        """Returns the weight that `product` multiplies by."""

    @abc.abstractmethod
    def product(self, x: Tensor) -> Tensor:  # [s, b, i] -> [s, b, o]
        """Returns the product, before sum and bias."""


class _Product(torch.autograd.Function):
    """`product`, with the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.dequantized(), None


class Int8Linear(QuantizedLinear):
    """One scale per output, the same on every rank, so that every tensor-parallel size gives the same weights."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def buffers_of(outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        yield "values", (outputs, inputs), torch.int8
        yield "scale", (outputs, 1), torch.float32

    def quantize_(self, weight: Tensor) -> None:  # [o, i]
        torchao, weight = _library("torchao.quantization"), weight.to(self.scale.device, self.library_dtype)
        scale = torchao.Int8Tensor.from_hp(weight, torchao.PerRow()).scale
        if self.group is not None and self.is_row_parallel:  # each rank has a part of the inputs only
            dist.all_reduce(scale, dist.ReduceOp.MAX, group=self.group)
        self.scale.copy_(scale)
        self.values.copy_(torchao.Int8Tensor.from_hp(weight, torchao.PerRow(), scale=scale).qdata)

    def dequantized(self) -> Tensor:  # [o, i]
        return (self.values * self.scale).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:  # [s, b, i] -> [s, b, o]
        return F.linear(
            x, _library("torchao.quantization").Int8Tensor(self.values, self.scale, [1, self.shape[1]], self.dtype)
        )


class NF4Linear(QuantizedLinear):
    """Weights in blocks of NF4_BLOCK. Every tensor-parallel size that cuts no block gives the same weights."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def buffers_of(outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        yield "packed", (-(-outputs * inputs // 2), 1), torch.uint8
        yield "scale", (-(-outputs * inputs // NF4_BLOCK),), torch.float32

    def quantize_(self, weight: Tensor) -> None:  # [o, i]
        weight = weight.to(self.scale.device, self.library_dtype)
        # Unlike in QLoRA, the scales are not quantized: that needs their mean, which differs from rank to rank.
        packed, state = _library("bitsandbytes.functional").quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        self.packed.copy_(packed)
        self.scale.copy_(state.absmax)

    def dequantized(self) -> Tensor:  # [o, i]
        functional = _library("bitsandbytes.functional")
        state = functional.QuantState(
            self.scale, torch.Size(self.shape), blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.library_dtype
        )
        weight: Tensor = functional.dequantize_4bit(self.packed, state).to(self.dtype)
        return weight

    def product(self, x: Tensor) -> Tensor:  # [s, b, i] -> [s, b, o]
        return F.linear(x, self.dequantized())


@functools.cache
def _library(name: str) -> ModuleType:
    """Imports a module without its warnings about missing kernels."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(name)
    finally:
        logging.disable(before)
