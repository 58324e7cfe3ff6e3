"""The decoding engine: requests come and go between steps, a step takes every running sequence on, and each token
leaves the network where its own confidence lets it.

A token that leaves early lacks keys and values in the deeper pieces. Its hidden state waits at their entrance (it is
*pending* there), and runs with the next token that goes deeper, as a causal block: shallow layers never run twice, and
the caches end up as a full pass leaves them.
Every rank of TP × PP makes the same calls and runs this same loop over the same tokens; only the stage that owns a
piece computes it.
"""

import time
from typing import NamedTuple

import torch

from ee_tuning.errors import InputError
from ee_tuning.generation.block_pool import BLOCK_SIZE, blocks_for
from ee_tuning.generation.drafting import Drafting
from ee_tuning.generation.judge import Answer, Judge, Left, Question
from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.params import SamplingParams
from ee_tuning.generation.pieces import cut_pieces
from ee_tuning.generation.policy import FULL, Policy
from ee_tuning.generation.requests import check_request
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.scheduler import Scheduler
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.walk import PieceWalk
from ee_tuning.generation.whole_step import WholeSteps
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.parallel.stage_link import StageLink

FILL_BEHIND = 4
"""Tokens of a sequence that wait at the entrance of a stage before it runs them."""


class TokenStep(NamedTuple):
    """One token of one sequence."""

    sequence: Sequence
    token_id: int
    exit_layer: int
    """The layer it left at; the number of layers where it did not leave early."""
    confidence: float
    """The confidence by the request's measure, of the plain softmax there; 0 where a shortlist's "any other token" was
    likeliest.
    """
    logprob: float | None = None
    """The token's log-probability, in the distribution it was chosen from; None where the request does not ask."""
    top_logprobs: dict[int, float] | None = None
    """The log-probabilities of the likeliest tokens there."""


class Engine:
    """Decodes up to `num_slots` sequences at a time, of up to `max_length` tokens each.

    stages[p] is stage p's (first, last) layer. `cache_tokens` bounds the tokens of all sequences together; by default
    all can be longest. Raises InputError where the model has fewer positions.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        stages: list[tuple[int, int]],
        *,
        num_slots: int,
        max_length: int,
        max_pending: int = 16,
        prefill_chunk: int = 512,
        cache_tokens: int | None = None,
        eos_ids: tuple[int, ...] = (),
        reuses_prefixes: bool = True,
    ):
        if max_length > model.plan.max_length:
            raise InputError(
                f"max_length must be at most {model.plan.max_length}, the positions that the model has, got {max_length}"
            )
        self.model, self.topology, self.config = model, model.topology, model.config
        self.pieces = cut_pieces(stages, model.plan.exit_layers)
        self.fill_behind = FILL_BEHIND
        self.max_pending, self.prefill_chunk, self.num_slots, self.eos_ids = (
            max_pending,
            prefill_chunk,
            num_slots,
            eos_ids,
        )
        tokens = num_slots * blocks_for(max_length) * BLOCK_SIZE if cache_tokens is None else cache_tokens
        self.cache = KVCache(
            self.config, self.topology, num_tokens=tokens, max_length=max_length, dtype=model.plan.dtype
        )
        self.link = StageLink(self.topology)
        self.runner = Runner(model, self.pieces, self.cache, self.link)
        self.judge = Judge(model, self.runner.heads, self.link)
        self.whole_steps = WholeSteps(self.runner)
        self.scheduler = Scheduler(
            self.cache, num_slots=num_slots, prefill_chunk=prefill_chunk, reuses_prefixes=reuses_prefixes
        )
        self.drafting = Drafting(self.runner, max_pending, self.scheduler.reserve)
        self.walk = PieceWalk(self.runner, self.judge, self.drafting)
        self.running, self.waiting = self.scheduler.running, self.scheduler.waiting
        self._landed: list[TokenStep] = []
        """Tokens that came between two steps."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.running and not self.waiting and not self._landed

    @property
    def seconds_in_heads(self) -> float:
        """Time on this rank, waiting for the rank that has the head included."""
        return self.walk.seconds_in_heads + self.drafting.seconds_in_heads + self.whole_steps.seconds_in_heads

    def add_request(
        self, prompt: list[int], params: SamplingParams | None = None, policy: Policy = FULL
    ) -> list[Sequence]:
        """Queues a prompt, once for each of its `n` completions; the next steps take them up as there is room, in
        order.

        Raises InputError, and queues nothing, on values no sampler can use and on a prompt that can never fit.
        """
        params = params or SamplingParams()
        check_request(prompt, params, policy, self.config, self.model.plan.exit_layers, self.cache)
        limit = min(len(prompt) + params.max_tokens, self.cache.max_length)
        last_piece = len(self.pieces) - 1
        if policy.fixed_exit is not None:
            last_piece = next(i for i, piece in enumerate(self.pieces) if piece.last_layer == policy.fixed_exit)
        stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_ids)
        own_layers = policy.asked & self.runner.head_layers.own
        added = [
            Sequence(
                tokens=list(prompt),
                params=params,
                policy=policy,
                limit=limit,
                stop_ids=stop_ids,
                last_piece=last_piece,
                completion=i,
                added_at=time.perf_counter(),
                watermarks=[0] * len(self.pieces),
                boundary=[[] for _ in self.pieces],
                head_watermarks=dict.fromkeys(own_layers, 0),
                head_states={layer: [] for layer in own_layers},
            )
            for i in range(params.n)
        ]
        self.waiting.extend(added)
        return added

    @torch.inference_mode()
    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence and frees its memory, whether it runs or waits; one that has ended is left as it is."""
        if sequence.number in self.whole_steps.busy:
            landed = self._end(self._add([left for left in self._heard() if left.sequence is not sequence]))
            self._landed += landed
        if not sequence.finish_reason:
            self._landed = [step for step in self._landed if step.sequence is not sequence]
            self._let_go(sequence, reason)

    @torch.inference_mode()
    def clear(self) -> None:
        """Aborts all sequences; what they said that no step has returned yet is forgotten."""
        for sequence in [*self.running, *self.waiting]:
            self.abort(sequence)
        self._landed.clear()

    def _let_go(self, sequence: Sequence, reason: str) -> None:
        if not self.scheduler.remove(sequence):
            return
        self.judge.forget(sequence)
        sequence.finish_reason = reason
        sequence.statistics.seconds = time.perf_counter() - sequence.added_at
        if not self.running and not self.waiting:
            self.link.finish()

    @torch.inference_mode()
    def step(self) -> list[TokenStep]:
        """Takes running sequences on: a token each in most steps, none for one whose prompt is still being read or that
        waits for a later stage, more where drafts were right.

        Sequences that end with their token are out of the engine afterwards, their finish_reason says why.
        """
        self.scheduler.admit()
        steps, self._landed = self._landed, []
        if self.whole_steps.busy and self.scheduler.is_short:
            steps += self._end(self._add(self._heard()))
        going = self._feed()
        left = self._take_at_once(going)
        if left is None:
            left = [*self._heard(), *self.walk.take(going, self.running)]
        steps += self._end(self._add(left))
        self._catch_up()
        return steps

    def _end(self, steps: list[TokenStep]) -> list[TokenStep]:
        """Lets those go that end with their token."""
        for sequence in {step.sequence.number: step.sequence for step in steps}.values():
            if sequence.finish_reason:
                self._let_go(sequence, sequence.finish_reason)
        return steps

    @torch.inference_mode()
    def full_model_tokens(self, tokens: list[int]) -> list[int]:
        """What the full model would say greedily after each prefix of `tokens`, from one pass over all of them. In an
        idle engine.
        """
        assert self.is_idle
        (sequence,) = self.add_request(tokens, SamplingParams(max_tokens=1))
        sequence.shares = False
        self.scheduler.admit()
        try:
            sequence.num_fed = len(tokens)
            for piece in range(len(self.pieces)):
                output = self.runner.run(piece, [sequence])
            (answers,) = self.walk.ask(
                len(self.pieces) - 1, None, [Question(sequence, list(range(len(tokens))), 1)], output
            )
        finally:
            self.abort(sequence)
        return [answer.token_id for answer in answers]

    def _feed(self) -> list[Sequence]:
        """The sequences that take part in this step, their next tokens at the entrance, those that speculate with a
        plan.
        """
        going = self.scheduler.feed(self.whole_steps.busy)
        for sequence in going:
            if sequence.speculates:
                self.drafting.begin(sequence, len(going))
        return going

    def _take_at_once(self, going: list[Sequence]) -> list[Left] | None:
        """A step in one call for each stage, or a round of drafts; None where the pieces have to be gone through one by
        one.

        Those that left go on in the next step, while later stages are with the others; whose word is heard once the
        first stage has done something else meanwhile, or has nothing else to do.
        """
        busy = self.whole_steps.busy
        if len(self.running) > len(going) + len(busy):
            return None  # somebody's prompt is not read on in this step
        if len(self.running) == 1 and going and going[0].speculates:
            return self.drafting.lone_round(going[0]) if going[0].has_all_fed else None
        left = self.whole_steps.begin(going) if going else []
        if left is None:
            return None
        left += self.whole_steps.hear_due()
        while (busy := self.whole_steps.busy) and len(busy) == len(self.running):
            left += self.whole_steps.proceed()
        return left

    def _heard(self) -> list[Left]:
        """All that later stages have yet to say."""
        left: list[Left] = []
        while self.whole_steps.busy:
            left += self.whole_steps.proceed()
        return left

    def _add(self, left: list[Left]) -> list[TokenStep]:
        """Adds tokens to sequences for good. What was drafted behind an end is nobody's."""
        return [self._take(*each) for each in left if not each.sequence.finish_reason]

    def _take(self, sequence: Sequence, answer: Answer, layer: int) -> TokenStep:
        """Adds a token to a sequence for good."""
        if len(sequence.tokens) == sequence.num_prompt_tokens:
            sequence.statistics.seconds_to_first_token = time.perf_counter() - sequence.added_at
        sequence.tokens.append(answer.token_id)
        sequence.statistics.exit_layers.append(layer)
        if answer.token_id in sequence.stop_ids and sequence.num_output > sequence.params.min_tokens:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            sequence.finish_reason = "length"
        return TokenStep(
            sequence, answer.token_id, layer, max(answer.confidence, 0.0), answer.logprob, answer.top_logprobs
        )

    def _catch_up(self) -> None:
        """Runs the deeper pieces for everybody once a sequence has as many tokens waiting at one as may wait there.

        At the entrance of a stage they are not let pile up: it computes them while the stages before it go on with the
        next tokens.
        """
        busy = self.whole_steps.busy
        free = [s for s in self.running if s.number not in busy and not s.speculates]
        for index in range(1, len(self.pieces)):
            is_other_stage = self.pieces[index].stage > self.pieces[index - 1].stage
            limit = min(self.fill_behind, self.max_pending) if is_other_stage else self.max_pending
            if any(s.num_pending(index) >= limit for s in free):
                while index < len(self.pieces):
                    rows, last = [s for s in free if s.num_pending(index)], index
                    while self.walk.runs_on(last, rows, self.running):
                        last += 1
                    for sequence in rows:
                        sequence.statistics.num_catch_up += sequence.num_pending(index) * (last - index + 1)
                    self.runner.run(index, rows, through=last)
                    index = last + 1
                return
