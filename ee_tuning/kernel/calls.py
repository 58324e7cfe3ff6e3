"""Arguments and calls of the kernels: structures of pointers to tensors, which the caller keeps alive. See
decoding.cpp.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ee_tuning.kernel.build import Number, kernels

# t tokens · h hidden · d width of a head · v vocabulary, padding included

MOST_TOKENS = 32
"""Most tokens of a pass for which a kernel is faster: for more, torch's matrix products are as fast."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""Activations in the order of the kernels' numbers."""
_NUMBERS: dict[torch.dtype, Number] = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "BFloat16"}
_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p


def _fields(integers: str = "", pointers: str = "") -> list[tuple[str, Any]]:
    return [(name, _INTEGER) for name in integers.split()] + [(name, _POINTER) for name in pointers.split()]


class Shape(ctypes.Structure):
    """The shape of every layer and head of a model."""

    _fields_ = [
        *_fields("hidden groups per_group width has_layer_norm is_rotated activation"),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


class MLP(ctypes.Structure):
    """The MLP of a layer or head; all null where there is none."""

    _fields_ = [*_fields(pointers="fc1 fc1_bias fc2 fc2_bias"), *_fields("inner is_gated")]


class Layer(ctypes.Structure):
    """A layer and its cache."""

    _fields_ = [
        *_fields(pointers="input_norm input_norm_bias qkv qkv_bias head_norm proj proj_bias mlp_norm mlp_norm_bias"),
        ("mlp", MLP),
        *_fields(pointers="keys values"),
    ]


class Row(ctypes.Structure):
    """Tokens of a sequence: `length` of them from position `start` on."""

    _fields_ = _fields("start length", "places")


class Pass(ctypes.Structure):
    """Tokens that go through layers together."""

    _fields_ = _fields("num_tokens num_rows num_threads", "rows cos sin")


class Head(ctypes.Structure):
    """The way from states to logits."""

    _fields_ = [*_fields(pointers="norm norm_bias output"), ("mlp", MLP), *_fields("num_ids num_rows", "token_ids")]


class Segment(ctypes.Structure):
    """Layers, and the head behind them; see step.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *_fields("num_layers"),
        ("own", ctypes.POINTER(Layer)),
        ("head", ctypes.POINTER(Head)),
        *_fields("takes_mlp_input is_read"),
    ]


class StepRow(ctypes.Structure):
    """The newest tokens of a sequence, and the exit of the last one; see step.h."""

    _fields_ = [
        *_fields(pointers="places num_computed num_own thresholds tokens"),
        *_fields("num_new num_arrived slot last_segment num_asked is_active rides most_drafts"),
        *_fields(pointers="ends"),
        *_fields("num_ends segment num_exit_answers"),
        *_fields(pointers="exit_answers top logits"),
        *_fields("num_drafted"),
    ]


class Step(ctypes.Structure):
    """A stage's part of a decoding step; see step.h."""

    _fields_ = [
        *_fields("num_threads num_rows num_segments first is_fill reads"),
        ("rows", ctypes.POINTER(StepRow)),
        ("segments", ctypes.POINTER(Segment)),
        *_fields(pointers="rings"),
        *_fields("capacity"),
        *_fields(pointers="cos sin embedding"),
        ("seconds_in_heads", ctypes.c_double),
    ]


def serves(tensor: Tensor) -> bool:
    """Whether this machine has kernels for such tensors."""
    return tensor.device.type == "cpu" and tensor.dtype in _NUMBERS and kernels(_NUMBERS[tensor.dtype]) is not None


def fill(structure: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    """Sets a structure's pointers. The tensors must be contiguous, and outlive it."""
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), name
        setattr(structure, name, None if tensor is None else tensor.data_ptr())


def native_batch(
    starts: Sequence[int], lengths: Sequence[int], places: Sequence[int], cos: Tensor, sin: Tensor
) -> Pass:
    """Returns the description of a pass. `places` are addresses of each row's places, int64 from its first token on;
    cos and sin [positions, d].
    """
    rows = (Row * len(starts))(*(Row(*row) for row in zip(starts, lengths, places, strict=True)))
    made = Pass(
        sum(lengths), len(starts), torch.get_num_threads(), ctypes.addressof(rows), cos.data_ptr(), sin.data_ptr()
    )
    made.kept = rows
    return made


def run_layers(
    shape: Shape,
    layers: "ctypes.Array[Layer]",
    given: Pass,
    hidden: Tensor,  # [t, h]
) -> tuple[Tensor, Tensor, Tensor]:  # [t, h] each
    """Returns hidden states behind the layers, and the last layer's MLP input and the residual that its output was
    added to.
    """
    hidden = hidden.contiguous()
    out, normed, residual = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(hidden)
    _function("run_layers", hidden.dtype)(
        shape, layers, len(layers), given, hidden.data_ptr(), out.data_ptr(), normed.data_ptr(), residual.data_ptr()
    )
    return out, normed, residual


def run_head(
    shape: Shape,
    head: Head,
    states: Tensor,
    residual: Tensor | None,  # [t, h]
) -> tuple[Tensor, Tensor]:  # [t, v], float32 of fewer bits; [t, 2] float64
    """Returns logits, and of each token the likeliest id and its probability, without ids of padding; for a shortlist
    as `token_top1` returns them.
    """
    states = states.contiguous()
    residual = None if residual is None else residual.contiguous()
    count = states.shape[0]
    logits = torch.empty(count, head.num_rows, dtype=torch.promote_types(states.dtype, torch.float32))
    top = torch.empty(count, 2, dtype=torch.float64)
    _function("run_head", states.dtype)(
        shape,
        head,
        count,
        torch.get_num_threads(),
        states.data_ptr(),
        None if residual is None else residual.data_ptr(),
        logits.data_ptr(),
        top.data_ptr(),
    )
    return logits, top


def run_step(shape: Shape, step: Step, dtype: torch.dtype) -> None:
    """Runs `step`, whose tensors are of `dtype`, and fills in its results."""
    _function("run_step", dtype)(shape, step)


_ARGUMENTS: dict[str, list[Any]] = {
    "run_layers": [ctypes.POINTER(Shape), ctypes.POINTER(Layer), _INTEGER, ctypes.POINTER(Pass), *[_POINTER] * 4],
    "run_step": [ctypes.POINTER(Shape), ctypes.POINTER(Step)],
    "run_head": [ctypes.POINTER(Shape), ctypes.POINTER(Head), _INTEGER, _INTEGER, *[_POINTER] * 4],
}


@cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(kernels(_NUMBERS[dtype]), name)
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function
