"""Operations of torch's attention, forward and backward.

torch's own counts refuse grouped queries up to release 2.12, and do not know the CPU's kernel.
"""

from typing import Any

_DENSE = tuple(
    f"aten::_scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention")
)
_BY_ROWS = ("torch_attn::_varlen_attn", "aten::_flash_attention_")
"""Operations on concatenated sequences. All rows are counted as long as the longest one."""


def is_attention(name: str) -> bool:
    """Whether the operation `name` is attention, whose operations `attention_flops` counts."""
    return name.startswith((*_DENSE, *_BY_ROWS))


def attention_flops(name: str, arguments: dict[str, Any]) -> int | None:
    """Returns the multiplications and additions of the operation `name`, or None if it is not attention.

    `arguments` are named as in its schema. Of causal attention only the necessary operations count: queries are the
    last ones of as many tokens as there are keys.
    """
    if name.startswith(_DENSE):
        num_rows, num_heads, num_queries, width = arguments["query"].shape
        num_keys = arguments["key"].shape[2]
    elif name.startswith(_BY_ROWS):
        _, num_heads, width = arguments["query"].shape
        bounds = arguments["cu_seq_q" if name.startswith("torch_attn") else "cum_seq_q"]
        num_rows, num_queries, num_keys = bounds.shape[0] - 1, arguments["max_q"], arguments["max_k"]
    else:
        return None
    # Scores and output; backward recomputes the scores and computes the gradients of values, scores, queries and keys.
    num_products = 5 if "backward" in name else 2
    twice_seen = 2 * num_queries * num_keys - (num_queries**2 if arguments.get("is_causal") else 0)
    return num_products * num_rows * num_heads * twice_seen * width
