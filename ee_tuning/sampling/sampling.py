"""The way from logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p, processed as
transformers does.

Needs torch alone. A draw depends only on a key, so that a prompt's tokens are the same in any batch. Similar
distributions mostly draw the same token with the same key, so that drafts can be accepted (see `draw`).
"""

# n sequences · v vocabulary, padding left out
import hashlib

import torch
from torch import Tensor

_COLD = 1e-30
"""Temperature below which only the largest logits can be drawn: divided by it, different ones lie 10²⁰ apart."""


def warped(
    scores: Tensor,  # [v] or [n, v]
    temperature: float,  # above 0
    top_k: int = 0,  # 0 for all
    top_p: float = 1.0,  # 1 for all
    min_p: float = 0.0,  # 0 for all
) -> Tensor:  # as scores, float32 (float64 for float64)
    """Returns scores / temperature, then the top_k largest (with those equal to the last), then the fewest likeliest
    that reach top_p together, then those at least min_p times as likely as the likeliest; the others are -inf. At least
    one is left. Order and ties are those of transformers' logits processors.
    """
    scores = _tempered(scores if scores.dtype == torch.float64 else scores.float(), temperature)
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k)[0][..., -1:], -torch.inf)
    if top_p < 1:
        scores = _keep_top_p(scores, top_p)
    if min_p > 0:
        likely = scores.softmax(-1)
        scores = scores.masked_fill(likely < min_p * likely.amax(-1, keepdim=True), -torch.inf)
    return scores


def request_key(seed: int, prompt: list[int], completion: int = 0) -> int:
    """Returns the seed of a completion's draws, from the request's seed, its prompt and the completion's number."""
    return _digest(f"{seed}:{prompt}:{completion}")


def sample_seed(request: int, length: int) -> int:
    """Returns the seed from which the token that follows `length` others of a request is drawn."""
    return _digest(f"{request}:{length}")


def draw(
    distribution: Tensor,  # [n, v], nonnegative
    keys: list[int],
) -> Tensor:  # [n], int64
    """Draws one token per row, never one of probability 0; rows need not sum to 1.

    An exponential race: token i wins with p_i / e_i largest, its e_i drawn from the row's key and i. Then two
    distributions p and q draw the same token with the same key at least as often as (1 - d) / (1 + d), d their total
    variation distance (Daliri, Musco and Suresh 2024, arXiv 2408.07978).
    """
    assert len(distribution) == len(keys), (len(distribution), len(keys))
    return (distribution.double() / _exponential(keys, distribution.shape[-1], distribution.device)).argmax(-1)


def _exponential(keys: list[int], size: int, device: torch.device) -> Tensor:  # [n, size] float64, above 0
    """Returns a number for each key and place, the same on any device: SplitMix64 (Steele, Lea and Flood 2014) of key +
    place.
    """
    # The product wraps around, as intended.
    x = torch.tensor(keys, device=device)[:, None] + torch.arange(1, size + 1, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    x = x ^ _shifted(x, 31)
    # A 52-bit integer plus one half: neither 0 nor 1 in float64, so the logarithm is finite and not 0.
    return -((_shifted(x, 12).double() + 0.5) * 2.0**-52).log()


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift is arithmetic: it copies the sign


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _tempered(scores: Tensor, temperature: float) -> Tensor:
    if temperature >= _COLD:
        return scores / temperature
    # The quotient, or the temperature itself, is beyond the type's range: of what lies below the largest, its limit is
    # minus infinity.
    largest = scores.amax(-1, keepdim=True)
    return torch.where(scores == largest, 0.0, -torch.inf).to(scores.dtype)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(-1)
    leaves = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    leaves[..., -1] = False
    return scores.masked_fill(leaves.scatter(-1, order, leaves), -torch.inf)
