"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p, processed as transformers does.

Needs torch alone. Rows draw from generators that the caller seeds for each, one number per token, so that a prompt's tokens are the
same in any batch.
"""
# n sequences · v vocabulary, padding left out
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def choose_token(logits: Tensor,  # [v] or [n, v], any float dtype
                 temperature: float,
                 top_k: int,
                 top_p: float,
                 generator: Generator | Sequence[Generator] | None,
                 ) -> Tensor:  # [] or [n], int64
    """The next token of each sequence: at temperature 0 the likeliest (of equals the lowest id), else a draw.

    `generator`: for logits [v] one, for [n, v] a sequence of n, row by row; each on the CPU, so that all devices draw alike. Greedy
    choice takes nothing from them and None will do.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_k, top_p), generator)


def probabilities(logits: Tensor,  # [v] or [n, v]
                  temperature: float,  # above 0
                  top_k: int,  # 0 for all
                  top_p: float,  # 1 for all
                  ) -> Tensor:  # as logits, float32 (float64 for float64 logits); tokens left out have exactly 0
    """What is drawn from: logits / temperature, then the top_k largest (with those equal to the last), then the fewest likeliest
    that reach top_p together (at least one), renormalized. The order and the ties are those of transformers' logits processors.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k)[0][..., -1:], -torch.inf)
    if top_p < 1:
        scores = _keep_top_p(scores, top_p)
    return scores.softmax(-1)


def draw(distribution: Tensor,  # [v] or [n, v], nonnegative
         generator: Generator | Sequence[Generator] | None) -> Tensor:  # [] or [n], int64
    """One token per row by inverting its cumulative sum at one uniform number; never one of probability 0. Rows need no sum of 1."""
    generators = generator if isinstance(generator, Sequence) else [generator]
    rows = distribution if distribution.dim() == 2 else distribution[None]
    assert len(rows) == len(generators), (len(rows), len(generators))
    uniform = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in generators]).to(rows.device)
    cumulative = rows.double().cumsum(-1)
    # In float64 the largest uniform number, 1 - 2^-53, times any total is still below it: past it lie tokens of probability 0, or none.
    point = uniform * cumulative[:, -1]
    token_ids = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    return token_ids if distribution.dim() == 2 else token_ids[0]


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(-1)
    leaves = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    leaves[..., -1] = False
    return scores.masked_fill(leaves.scatter(-1, order, leaves), -torch.inf)
