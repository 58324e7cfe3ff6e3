"""Attention of a drafting head that is unrolled over a whole text at once: every token begins its own draft.

Step 0 is causal attention. In a later step a query attends to the keys of step 0 up to its token, and then to its own
draft: the keys of each step so far at its own position. Decoding does the same, since the drafts after a token are
discarded before the next one begins (training-time test, arXiv 2503.01840).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ee_tuning.model.documents import PackedDocuments

# s sequence · b micro-batch · n query heads · g key-value heads · r = n/g · d width of a head · c queries of a block

BLOCK = 256
"""Number of queries whose scores exist at one time."""


def unrolled_attention(
    query: Tensor,  # [s, b, n, d], of the newest step
    keys: list[Tensor],  # [s, b, g, d] each, one per step so far
    values: list[Tensor],
    scale: float,
    documents: PackedDocuments | None,
) -> Tensor:  # [s, b, n * d]
    """Returns the attention's output for each token's draft, which attends to the text up to the token and to its own
    earlier steps.

    The backward pass recomputes the scores of each block: storing them would take s · s numbers for every head and
    step.
    """
    s, b, n, d = query.shape
    groups = keys[0].shape[2]
    q = query.permute(1, 2, 0, 3)  # [b, n, s, d]
    own_keys, own_values = ([x.permute(1, 2, 0, 3) for x in each] for each in (keys, values))  # [b, g, s, d]
    if len(keys) == 1:
        mask = None if documents is None else documents.mask
        out = F.scaled_dot_product_attention(
            q, own_keys[0], own_values[0], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups != n
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
    q = q.unflatten(1, (groups, n // groups)) * scale  # [b, g, r, s, d]
    ids = None if documents is None else documents.ids
    blocks = []
    for first in range(0, s, BLOCK):
        last = min(first + BLOCK, s)
        part = slice(first, last)
        parts = [
            q[..., part, :],
            _seen(first, last, ids, q.device),
            *(
                x[:, :, :last] if index == 0 else x[:, :, part]
                for each in (own_keys, own_values)
                for index, x in enumerate(each)
            ),
        ]
        blocks.append(checkpoint(_attend, *parts, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(blocks, dim=-2).flatten(1, 2).permute(2, 0, 1, 3).reshape(s, b, n * d)


def _seen(first: int, last: int, ids: Tensor | None, device: torch.device) -> Tensor:
    """Returns [1 or b, 1, 1, c, last] bool: the tokens of the text that queries first .. last - 1 attend to."""
    place = torch.arange(last, device=device)
    seen = (place <= place[first:, None])[None]
    if ids is not None:
        seen = seen & (ids[:, first:last, None] == ids[:, None, :last])
    return seen[:, None, None]


def _attend(query: Tensor, seen: Tensor, *keys_and_values: Tensor) -> Tensor:  # [b, g, r, c, d]
    half = len(keys_and_values) // 2
    (text_keys, *own_keys), (text_values, *own_values) = keys_and_values[:half], keys_and_values[half:]
    scores = query @ text_keys[:, :, None].transpose(-1, -2)  # [b, g, r, c, last]
    of_own = torch.stack([(query * each[:, :, None]).sum(-1) for each in own_keys], dim=-1)  # [b, g, r, c, steps]
    scores = torch.cat((scores.masked_fill(~seen, -torch.inf), of_own), dim=-1)
    shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(query.dtype)
    length = text_keys.shape[2]
    out = shares[..., :length] @ text_values[:, :, None]
    for index, each in enumerate(own_values):
        out = out + shares[..., length + index, None] * each[:, :, None]
    return out
