"""Chooses the next tokens of rows that left the network, for all of a stage's rows together.

Logits are changed by bias, penalties and the ban on early stop tokens before a token is chosen. The order is
transformers'.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.step_plan import Answer
from ee_tuning.parallel.time_parts import part
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.sampling import draw, sample_seed, warped

# v vocabulary, padding left out


class SampleRequest(NamedTuple):
    """A token whose choice needs more than its logit."""

    sequence: Sequence
    length: int
    """The number of tokens that it follows."""
    confidence: float
    logits: Tensor = torch.empty(0)
    """[v], on the CPU; -inf for tokens that the head can not predict."""


class Sampler:
    """Applies penalties, bias, grammars, temperature and other processors, and samples."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._counts: dict[int, TokenCounts] = {}

    def forget(self, sequence: Sequence) -> None:
        """Frees the token counts of a sequence that has ended."""
        self._counts.pop(sequence.number, None)

    @part("sampling")
    def sample(self, requests: list[SampleRequest]) -> list[Answer]:
        """Returns the answer to each request. Requests with equal sampling parameters are sampled together."""
        groups: dict[tuple[float | None, ...], list[int]] = {}
        scores = []
        for place, request in enumerate(requests):
            params = request.sequence.params
            key = (params.temperature, params.top_k, params.top_p, params.min_p, params.logprobs)
            groups.setdefault(key, []).append(place)
            scores.append(self._scores(request))
        answers: list[Answer | None] = [None] * len(requests)
        for places in groups.values():
            chosen = _sample_alike([requests[place] for place in places], torch.stack([scores[p] for p in places]))
            for place, answer in zip(places, chosen, strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _scores(self, request: SampleRequest) -> Tensor:  # [v]
        sequence, counts = request.sequence, None
        if sequence.params.has_penalties:
            counts = self._counts.get(sequence.number)
            if counts is None:
                counts = self._counts[sequence.number] = TokenCounts(self._vocab_size, sequence.num_prompt_tokens)
            counts.move_to(sequence.tokens, request.length)
        scores = processed(request.logits, sequence, request.length, counts)
        if scores.isneginf().all():
            scores = request.logits.to(scores.dtype)
        allowed = sequence.grammar.allowed(sequence.tokens, request.length) if sequence.grammar is not None else None
        return scores if allowed is None else within(scores, allowed)


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


def _sample_alike(requests: list[SampleRequest], scores: Tensor) -> list[Answer]:  # [n, v]
    params: SamplingParams = requests[0].sequence.params
    known = log_probabilities(scores, params)
    if params.is_greedy:
        tokens = known.argmax(-1)
    else:
        tokens = draw(known.exp(), [sample_seed(each.sequence.key, each.length) for each in requests])
    ids = tokens.tolist()
    if params.logprobs is None:
        return [Answer(each.confidence, token) for each, token in zip(requests, ids, strict=True)]
    chosen = known.gather(1, tokens[:, None])[:, 0].double().tolist()
    best, best_ids = known.topk(params.logprobs) if params.logprobs else (known[:, :0], tokens[:, None][:, :0])
    tops = [dict(zip(*each, strict=True)) for each in zip(best_ids.tolist(), best.double().tolist(), strict=True)]
    return [
        Answer(each.confidence, token, logprob, top)
        for each, token, logprob, top in zip(requests, ids, chosen, tops, strict=True)
    ]


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
