"""Operations of torch's attention, forward and backward.

torch's own counts refuse grouped queries up to release 2.12, and do not know the CPU's kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

_DENSE = tuple(
    f"aten::_scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention")
)
_BY_ROWS = {"torch_attn::_varlen_attn": "cu_seq_q", "aten::_flash_attention_": "cum_seq_q"}
"""Operations on concatenated sequences, with the argument that holds the sequences' bounds. All rows are counted as
long as the longest one.
"""
_FORWARD, _BACKWARD = 2, 5
"""Matrix products: of scores and output; backward recomputes the scores and computes the gradients of values, scores,
queries and keys.
"""

AttentionFlops = Callable[[dict[str, Any]], int]
"""Arguments of an operation, named as in its schema -> its multiplications and additions. Of causal attention only the
necessary operations count: queries are the last ones of as many tokens as there are keys.
"""


def flops_if_attention(name: str) -> AttentionFlops | None:
    """Returns what counts the operation `name`, or None where that is no attention."""
    num_products = _BACKWARD if "backward" in name else _FORWARD
    if name.startswith(_DENSE):
        return partial(dense_attention_flops, num_products=num_products)
    for beginning, bounds in _BY_ROWS.items():
        if name.startswith(beginning):
            return partial(_flops_by_rows, bounds=bounds, num_products=num_products)
    return None


def dense_attention_flops(arguments: dict[str, Any], num_products: int = _FORWARD) -> int:
    """Returns the multiplications and additions of attention over rows of one length; see AttentionFlops."""
    num_rows, num_heads, num_queries, width = arguments["query"].shape
    num_keys = arguments["key"].shape[2]
    return num_products * num_rows * num_heads * _twice_seen(arguments, num_queries, num_keys) * width


def _flops_by_rows(arguments: dict[str, Any], bounds: str, num_products: int) -> int:
    _, num_heads, width = arguments["query"].shape
    num_rows = arguments[bounds].shape[0] - 1
    twice_seen = _twice_seen(arguments, arguments["max_q"], arguments["max_k"])
    return num_products * num_rows * num_heads * twice_seen * width


def _twice_seen(arguments: dict[str, Any], num_queries: int, num_keys: int) -> int:
    """Returns twice the number of pairs of a query with a key that it sees."""
    return 2 * num_queries * num_keys - (num_queries**2 if arguments.get("is_causal") else 0)
