"""Asks a head about states of a pass: is it sure enough, and which token is next? Decided once, then the same on every
rank.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.generation.params import SamplingParams
from ee_tuning.generation.processors import TokenCounts, log_probabilities, processed, takes_likeliest
from ee_tuning.generation.sampling import draw, draw_key
from ee_tuning.generation.sequence import Sequence
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_head import RaggedHead
from ee_tuning.parallel.shortlist import UNSURE, token_confidences, token_logits
from ee_tuning.parallel.stage_link import StageLink
from ee_tuning.parallel.vocab import VocabShard

# q states that a head is asked about · v vocabulary


class Question(NamedTuple):
    """About consecutive states of one sequence: the first follows `length` of its tokens, each next one a token
    more.
    """

    sequence: Sequence
    states: list[int]
    """Their places in the pass."""
    length: int
    threshold: float = -1.0
    """Tokens are chosen where the confidence is at least this."""


class Answer(NamedTuple):
    """About one state."""

    confidence: float
    token_id: int
    """Chosen as if all tokens before it were final. Without meaning where the head was not sure enough."""
    logprob: float | None
    top_logprobs: dict[int, float] | None
    """The likeliest tokens, where asked for."""


class Left(NamedTuple):
    """The next token of a sequence, and the layer that the token before it left at."""

    sequence: Sequence
    answer: Answer
    layer: int


class Judge:
    """The heads of one stage, and the agreement of all ranks on what they say."""

    def __init__(self, model: EarlyExitModel, heads: Mapping[int | None, RaggedHead], link: StageLink):
        self.model, self.heads, self.link = model, heads, link
        self._is_alone = model.topology.num_in_replica == 1
        self._counts: dict[int, TokenCounts] = {}

    def forget(self, sequence: Sequence) -> None:
        """Frees what is kept of a sequence that has ended."""
        self._counts.pop(sequence.number, None)

    def ask(
        self, head_layer: int | None, questions: list[Question], inputs: ExitInput | None, stage: int
    ) -> list[list[Answer]]:
        """An answer for each state of each question. `inputs` are of these states, in order, on the stage that has the
        head.

        `head_layer` None is the model's own final head.
        """
        if self._is_alone and all([_is_plain(q) for q in questions]):
            assert inputs is not None
            said = iter(self.heads[head_layer].ask(inputs)[1].tolist())
            return [
                [
                    Answer(confidence, int(token), None, None)
                    for _, (token, confidence) in zip(q.states, said, strict=False)
                ]
                for q in questions
            ]
        num_top = max((q.sequence.params.logprobs or 0 for q in questions), default=0)
        num_states = sum(len(q.states) for q in questions)
        decided = torch.full((num_states, 3 + 2 * num_top), -1.0, dtype=torch.float64)
        if inputs is not None:
            self._decide(decided, head_layer, questions, inputs, num_top)
        self.link.broadcast(decided, stage)
        rows = iter(decided.tolist())
        return [[_answer(next(rows), q.sequence, num_top) for _ in q.states] for q in questions]

    def _decide(
        self, decided: Tensor, head_layer: int | None, questions: list[Question], inputs: ExitInput, num_top: int
    ) -> None:
        logits, decided[:, :2] = self.heads[head_layer].ask(inputs)
        first = 0
        careful: list[tuple[Question, int]] = []
        for q in questions:
            last = first + len(q.states)
            if q.sequence.policy.measure != "max_probability":
                vocab = self.heads[head_layer].vocab
                decided[first:last, 1] = token_confidences(logits[first:last], vocab, q.sequence.policy.measure)
            if not takes_likeliest(q.sequence, q.length):
                careful.append((q, first))
            first = last
        if careful:
            self._choose(decided, logits, self.heads[head_layer].vocab, careful, num_top)

    def _choose(
        self, decided: Tensor, logits: Tensor, vocab: VocabShard, careful: list[tuple[Question, int]], num_top: int
    ) -> None:
        """Tokens of questions that ask for more than the likeliest one: of a shortlist, chosen among what is listed."""
        wanted = [
            first + i for q, first in careful for i in range(len(q.states)) if decided[first + i, 1] >= q.threshold
        ]
        if not wanted:  # the same on all tensor-parallel ranks
            return
        whole = dict(zip(wanted, token_logits(logits[wanted], vocab).cpu(), strict=True))
        alike: dict[tuple[float | None, ...], list[_Choice]] = {}
        for q, first in careful:
            params = q.sequence.params
            for i in range(len(q.states)):
                if first + i in whole:
                    scores = self._scores(whole[first + i], q.sequence, q.length + i)
                    if scores.isneginf().all():  # a shortlist of which the request allows nothing
                        decided[first + i, 1] = UNSURE
                        continue
                    group = alike.setdefault(
                        (params.temperature, params.top_k, params.top_p, params.min_p, params.logprobs), []
                    )
                    group.append(_Choice(first + i, scores, draw_key(q.sequence.key, q.length + i), params))
        for group in alike.values():
            _choose_alike(decided, group, num_top)

    def _scores(self, logits: Tensor, sequence: Sequence, length: int) -> Tensor:  # [v] -> [v]
        counts = None
        if sequence.params.has_penalties:
            counts = self._counts.get(sequence.number)
            if counts is None:
                counts = self._counts[sequence.number] = TokenCounts(self.model.vocab.size, sequence.num_prompt_tokens)
            counts.move_to(sequence.tokens, length)
        return processed(logits, sequence, length, counts)


def _is_plain(question: Question) -> bool:
    """Whether a head's likeliest token and its probability are the answer."""
    return question.sequence.policy.measure == "max_probability" and takes_likeliest(question.sequence, question.length)


class _Choice(NamedTuple):
    place: int
    scores: Tensor  # [v]
    key: int
    params: SamplingParams


def _choose_alike(decided: Tensor, group: list[_Choice], num_top: int) -> None:
    """Chooses for states that are sampled alike."""
    params, places = group[0].params, [choice.place for choice in group]
    known = log_probabilities(torch.stack([choice.scores for choice in group]), params)
    tokens = known.argmax(-1) if params.is_greedy else draw(known.exp(), [choice.key for choice in group])
    decided[places, 0], decided[places, 2] = tokens.double(), known.gather(1, tokens[:, None])[:, 0].double()
    if params.logprobs:
        best, ids = known.topk(params.logprobs)
        decided[places, 3 : 3 + params.logprobs] = ids.double()
        decided[places, 3 + num_top : 3 + num_top + params.logprobs] = best.double()


def _answer(row: list[float], sequence: Sequence, num_top: int) -> Answer:
    wanted = sequence.params.logprobs
    if wanted is None:
        return Answer(row[1], int(row[0]), None, None)
    ids, best = row[3 : 3 + wanted], row[3 + num_top : 3 + num_top + wanted]
    return Answer(row[1], int(row[0]), row[2], {int(token): logprob for token, logprob in zip(ids, best, strict=True)})
