"""FlashAttention over rows of any length, through the interfaces of the installed torch.

`varlen_attn` has gained parameters from release to release, and refuses the ones that it does not know: up to torch
2.11 it lacks `seqused_k`, `block_table` and `enable_gqa`. The operator beneath it takes `seqused_k` in every supported
release, and grouped queries as they are.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

# t tokens of all rows · r rows · g key-value heads · n query heads · d width of a head · p places of a cache

_KERNEL: Any = torch.ops.aten._flash_attention_forward


def takes(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel supports tensors of this dtype and heads of this width."""
    return dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def serves(like: Tensor, parameter: str | None = None) -> bool:
    """Whether a kernel exists for tensors of this device, dtype and last dimension, d, and takes `parameter`."""
    if (
        not like.is_cuda
        or not takes(like.dtype, like.shape[-1])
        or not torch.backends.cuda.is_flash_attention_available()
        or torch.cuda.get_device_capability(like.device) < (8, 0)
    ):
        return False
    is_known = parameter is None or parameter in _parameters(varlen_attn())
    return is_known or (parameter == "seqused_k" and _kernel_has_seqused_k())


def varlen_attention(
    query: Tensor,  # [t, n, d]
    key: Tensor,
    value: Tensor,  # [places, g, d] each; with a block table [blocks, places of one, g, d]
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,  # [r + 1] int32: where rows begin, and end
    max_q: int,
    max_k: int,
    *,
    scale: float,
    is_causal: bool = False,
    seqused_k: Tensor | None = None,  # [r] int32: keys that a row sees from its beginning on
    block_table: Tensor | None = None,  # [r, blocks of one] int32
) -> Tensor:  # [t, n, d]
    """Like torch's `varlen_attn`. Several query heads share a key head where g is less than n."""
    wanted: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if is_causal else (-1, -1)}
    wanted |= {name: x for name, x in (("seqused_k", seqused_k), ("block_table", block_table)) if x is not None}
    if wanted.keys() <= (names := _parameters(varlen_attn())):
        if key.shape[-2] != query.shape[-2] and "enable_gqa" in names:
            wanted["enable_gqa"] = True
        out = varlen_attn()(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **wanted)
        assert isinstance(out, Tensor)
        return out
    assert block_table is None, "only varlen_attn has a parameter for blocks"
    return _KERNEL(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, is_causal, False, scale=scale, seqused_k=seqused_k
    )[0]


@cache
def varlen_attn() -> Any:
    """Returns torch's function, or None where it has none. Imported where there is a kernel for it: torch 2.13 imports
    its compiler along, which takes a second.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def _kernel_has_seqused_k() -> bool:
    return any(argument.name == "seqused_k" for argument in _KERNEL.default._schema.arguments)
