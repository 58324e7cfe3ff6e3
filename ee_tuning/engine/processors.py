"""Logits processors: bias, penalties, and the ban on early stop tokens, applied before a token is chosen. The order is
transformers'.
"""

import torch
from torch import Tensor

from ee_tuning.engine.sequence import Sequence
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.sampling import warped

# v vocabulary, padding left out


class TokenCounts:
    """Counts of each token in the first n tokens of a sequence, and in its completion; n moves forward and back."""

    def __init__(self, vocab_size: int, num_prompt_tokens: int):
        self.in_all = torch.zeros(vocab_size)
        self.in_completion = torch.zeros(vocab_size)
        self._num_prompt_tokens = num_prompt_tokens
        self._counted: list[int] = []

    def move_to(self, tokens: list[int], n: int) -> None:
        """Counts the first n of `tokens`, which differ from the tokens counted before only by rejected drafts at the
        end.
        """
        while self._counted and (len(self._counted) > n or self._counted[-1] != tokens[len(self._counted) - 1]):
            self._add(self._counted.pop(), len(self._counted), -1)
        for place in range(len(self._counted), n):
            self._add(tokens[place], place, 1)
            self._counted.append(tokens[place])

    def _add(self, token: int, place: int, one: int) -> None:
        self.in_all[token] += one
        if place >= self._num_prompt_tokens:
            self.in_completion[token] += one


def processed(
    logits: Tensor,  # [v]
    sequence: Sequence,
    length: int,
    counts: TokenCounts | None,
) -> Tensor:  # [v], at least float32
    """Returns the logits of the token that follows the first `length` of a sequence. `counts` are for that length; None
    where nothing is penalized.
    """
    params = sequence.params
    scores = logits.double() if logits.dtype == torch.float64 else logits.float()
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype)
        scores = scores.index_add(0, torch.tensor(list(params.logit_bias)), biases)
    if counts is not None:
        scores = _penalized(scores, params, counts)
    if length - sequence.num_prompt_tokens < params.min_tokens and sequence.stop_ids:
        scores = scores.index_fill(0, torch.tensor(sorted(sequence.stop_ids)), -torch.inf)
    return scores


def within(
    scores: Tensor,  # [v], processed
    allowed: Tensor,  # [v] bool, not all False
) -> Tensor:  # [v]
    """Returns the scores of allowed tokens. Tokens that the head can not predict get equal scores, because "any other
    token" of a shortlist does not distinguish among them.
    """
    kept = torch.where(allowed, scores, -torch.inf)
    return torch.where(allowed, 0.0, kept) if kept.amax() == -torch.inf else kept


def log_probabilities(
    scores: Tensor,  # [..., v], processed
    params: SamplingParams,
) -> Tensor:  # [..., v]
    """Returns the log-probabilities of the distribution that a token is chosen from; greedy choice takes the largest of
    the softmax at temperature 1.
    """
    if not params.is_greedy:
        scores = warped(scores, params.temperature, params.top_k, params.top_p, params.min_p)
    return scores.log_softmax(-1)


def _penalized(scores: Tensor, params: SamplingParams, counts: TokenCounts) -> Tensor:
    # Keskar et al. 2019, arXiv 1909.05858, for the first; OpenAI's API reference for the other two.
    if params.repetition_penalty != 1:
        by_sign = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        scores = torch.where(counts.in_all > 0, by_sign, scores)
    if params.presence_penalty:
        scores = scores - params.presence_penalty * (counts.in_completion > 0)
    if params.frequency_penalty:
        scores = scores - params.frequency_penalty * counts.in_completion
    return scores
