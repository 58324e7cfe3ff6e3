"""Chooses the next tokens of rows that left the network, for all of a stage's rows together."""

from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.engine.processors import TokenCounts, log_probabilities, processed, within
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.step_plan import Answer
from ee_tuning.parallel.time_parts import part
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.sampling import draw, draw_key

# v vocabulary


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


def _sample_alike(requests: list[SampleRequest], scores: Tensor) -> list[Answer]:  # [n, v]
    params: SamplingParams = requests[0].sequence.params
    known = log_probabilities(scores, params)
    if params.is_greedy:
        tokens = known.argmax(-1)
    else:
        tokens = draw(known.exp(), [draw_key(each.sequence.key, each.length) for each in requests])
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
