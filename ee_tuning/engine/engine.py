"""The decoding engine: requests come and go between steps, and a step takes every running sequence on.

A step is `schedule`, run, `update`, as in vLLM; over pipeline stages some steps are in flight. The difference is that a
token may leave the network at an exit. It then lacks keys and values in deeper segments: its hidden state is *pending*
there, and runs with the next token that goes deeper, as a causal block. So shallow layers never run twice, and the
caches end up as a full pass leaves them. Every rank of TP × PP makes the same calls and the same decisions; only the
stage that has a segment computes it.
"""

import math
import time
from array import array
from typing import NamedTuple

import torch

from ee_tuning.decoding.eager_attention import BLOCK_SIZE
from ee_tuning.engine.cost_model import expected_costs
from ee_tuning.engine.draft_head import DraftHead
from ee_tuning.engine.draft_head_proposer import MOST_DRAFTS, DraftHeadProposer
from ee_tuning.engine.draft_proposer import DraftProposer, fit_drafts
from ee_tuning.engine.in_flight import Finished, InFlightSteps
from ee_tuning.engine.kv_cache import KVCache, blocks_for
from ee_tuning.engine.model_runner import ModelRunner
from ee_tuning.engine.requests import check_request
from ee_tuning.engine.scheduler import Scheduler
from ee_tuning.engine.segments import cut_segments
from ee_tuning.engine.sequence import NOT_KEPT, Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, RowOutput, RowPlan
from ee_tuning.errors import InputError
from ee_tuning.kernel import calls
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.stage_link import StageLink
from ee_tuning.sampling.grammar import Grammars, GrammarState
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

MOST_PENDING_AT_STAGE = 4
"""Tokens of a sequence that may be pending in front of a stage: it computes them while the stages before it continue
with the next tokens.
"""


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
    it suffices for all of them at `max_length`. Structured output needs `grammars`. Raises InputError where the model
    has fewer positions.
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
        grammars: Grammars | None = None,
    ):
        if max_length > model.plan.max_length:
            raise InputError(
                f"max_length must be at most {model.plan.max_length}, the positions that the model has, got {max_length}"
            )
        self.model, self.num_slots, self.max_pending, self.eos_ids = model, num_slots, max_pending, eos_ids
        self.segments = cut_segments(stages, model.plan.exit_layers, model.plan.aux_layers)
        tokens = num_slots * blocks_for(max_length) * BLOCK_SIZE if cache_tokens is None else cache_tokens
        self.cache = KVCache(
            model.config, model.topology, num_tokens=tokens, max_length=max_length, dtype=model.plan.dtype
        )
        self.grammars = grammars
        self.link = StageLink(model.topology)
        self.stage = StageModel(model, self.segments, self.cache, num_slots=num_slots, max_pending=max_pending)
        self.runner = ModelRunner(self.stage)
        self.in_flight = InFlightSteps(self.runner, self.link)
        self.scheduler = Scheduler(
            self.cache, num_slots=num_slots, prefill_chunk=prefill_chunk, reuses_prefixes=reuses_prefixes
        )
        self.proposer = DraftProposer(self.stage, max_pending)
        self.head_proposer = self._head_proposer() if model.plan.aux_layers else None
        """Drafts by the model's drafting head; None for a model without one."""
        self.running, self.waiting = self.scheduler.running, self.scheduler.waiting
        self._never = array("d", [math.inf] * len(self.segments))
        self._landed: list[TokenStep] = []
        """Tokens that were finished between two steps."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.running and not self.waiting and not self._landed

    @property
    def seconds_in_heads(self) -> float:
        """Seconds in the heads of this rank."""
        return self.stage.seconds_in_heads

    def add_request(
        self, prompt: list[int], params: SamplingParams | None = None, policy: Policy = FULL, priority: int = 0
    ) -> list[Sequence]:
        """Queues a prompt, once for each of its `n` completions; the next steps admit them as there is room, in order,
        those with a lower `priority` first.

        Raises InputError, and queues nothing, on values that no sampler can use and on a prompt that can never fit.
        """
        params = params or SamplingParams()
        check_request(prompt, params, policy, self.model.config, self.model.plan, self.cache)
        added = [self._sequence(prompt, params, policy, number, priority) for number in range(params.n)]
        for sequence in added:
            self.scheduler.enqueue(sequence)
        return added

    def _head_proposer(self) -> DraftHeadProposer:
        head = None
        if self.model.plan.drafts:
            (trained,) = self.model.exit_heads.values()
            assert isinstance(trained, Eagle3Head)
            head = DraftHead(self.stage, trained)
        return DraftHeadProposer(head, self.link, expected_costs(self.stage), self.stage)

    def _sequence(
        self, prompt: list[int], params: SamplingParams, policy: Policy, completion: int, priority: int
    ) -> Sequence:
        exits = [segment.exit_layer for segment in self.segments]
        stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_ids)
        last_segment = len(exits) - 1 if policy.fixed_exit is None else exits.index(policy.fixed_exit)
        thresholds = [policy.thresholds.get(layer, math.inf) if layer is not None else math.inf for layer in exits]
        own = {number for number in self.stage.own_layers if exits[number] in policy.asked}
        return Sequence(
            tokens=list(prompt),
            params=params,
            policy=policy,
            limit=min(len(prompt) + params.max_tokens, self.cache.max_length),
            stop_ids=stop_ids,
            last_segment=last_segment,
            exit_thresholds=array("d", thresholds),
            num_computed=array("q", [0] * len(exits)),
            num_own_computed=array("q", [0 if number in own else NOT_KEPT for number in range(len(exits))]),
            completion=completion,
            priority=priority,
            added_at=time.perf_counter(),
            fused_segments=tuple(exits.index(layer) for layer in params.fusion.layers),
            uses_prefix_cache=not policy.has_draft_head,  # the head has its own keys and values
            grammar=self._grammar(len(prompt), params, stop_ids),
        )

    def _grammar(self, num_prompt_tokens: int, params: SamplingParams, stop_ids: frozenset[int]) -> GrammarState | None:
        if params.structured_output is None:
            return None
        if self.grammars is None:
            raise InputError(
                "structured_output needs the model's tokenizer, and this engine has none; give it grammars"
            )
        return self.grammars.begin(params.structured_output, num_prompt_tokens, stop_ids)

    @torch.inference_mode()
    def step(self) -> list[TokenStep]:
        """Advances running sequences: by one token each in most steps; by none where the prompt is still being read or
        a later stage is awaited; by several where drafts were right. Sequences that end with their token are removed
        from the engine; their finish_reason says why.
        """
        self.scheduler.admit(self.in_flight.busy)
        self.proposer.begin_step()
        tokens, self._landed = self._landed, []
        if len(self.in_flight) and self.scheduler.is_short:
            tokens += self._update(self.in_flight.finish())
            self._catch_up()  # or a sequence that begins its next step at once would have too many tokens
        scheduled = self.scheduler.schedule(self.in_flight.busy)
        finished = self.in_flight.start([self._row(sequence, len(scheduled)) for sequence in scheduled])
        finished += self.in_flight.finish_due()
        while len(self.in_flight) and len(self.in_flight.busy) == len(self.running):
            finished += self.in_flight.advance()  # no sequence can begin another step
        tokens += self._update(finished)
        self._catch_up()
        return tokens

    @torch.inference_mode()
    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence and frees its memory, whether it runs or waits. A sequence that has ended is left as
        it is.
        """
        if sequence.number in self.in_flight.busy:
            self._landed += self._update([e for e in self.in_flight.finish() if e[0].sequence is not sequence])
            self._catch_up()
        if not sequence.finish_reason:
            self._landed = [step for step in self._landed if step.sequence is not sequence]
            self._finish(sequence, reason)

    @torch.inference_mode()
    def clear(self) -> None:
        """Aborts all sequences, and drops tokens that no step has returned yet."""
        for sequence in [*self.running, *self.waiting]:
            self.abort(sequence)
        self._landed.clear()

    @torch.inference_mode()
    def full_model_tokens(self, tokens: list[int]) -> list[int]:
        """Returns the greedy token of the full model after each prefix of `tokens`, from one pass. The engine must be
        idle.
        """
        assert self.is_idle
        (sequence,) = self.add_request(tokens, SamplingParams(max_tokens=1))
        sequence.uses_prefix_cache = False
        self.scheduler.admit()
        try:
            sequence.num_scheduled = len(tokens)
            row = RowPlan(sequence, self._never, num_asked=len(tokens), num_new=len(tokens))
            ((_, output),) = self.in_flight.start([row]) + self.in_flight.finish()
        finally:
            self.abort(sequence)
        return [answer.token_id for answer in output.answers]

    def _row(self, sequence: Sequence, num_rows: int) -> RowPlan:
        """Returns the row of a scheduled sequence in a step of `num_rows`."""
        sequence.drafts.num_rows = num_rows
        num_new = sequence.num_scheduled - sequence.num_computed[0]
        if not sequence.is_all_scheduled:
            return RowPlan(sequence, self._never, num_asked=0, num_new=num_new)
        if sequence.num_output == 0:  # reading the prompt fills every segment, so the final head costs little more
            return RowPlan(sequence, self._never, num_new=num_new)
        if self._allows_nothing_at_exits(sequence):
            return RowPlan(
                sequence, self._never, num_asked=sequence.num_drafts + 1, num_new=num_new, rides=not sequence.speculates
            )
        if not sequence.speculates:
            return RowPlan(sequence, self._thresholds(sequence), num_new=num_new)
        row = self._proposer_of(sequence).plan(sequence)
        if row.most_drafts:
            room = self._room(sequence, row.most_drafts)
            row.most_drafts = max(0, min(row.most_drafts, room, calls.MOST_TOKENS - 1 - sequence.num_drafts))
        return row

    def _thresholds(self, sequence: Sequence) -> "array[float]":
        """Returns the thresholds of a sequence's policy; where its form allows one token only, the first exit is
        certain of it.
        """
        given, grammar = sequence.exit_thresholds, sequence.grammar
        if grammar is None or not sequence.policy.thresholds or not grammar.is_forced(sequence.tokens):
            return given
        return array("d", [-math.inf if value < math.inf else value for value in given])

    def _proposer_of(self, sequence: Sequence) -> DraftProposer | DraftHeadProposer:
        """Returns the proposer of a sequence that speculates."""
        if not sequence.policy.has_draft_head:
            return self.proposer
        assert self.head_proposer is not None
        return self.head_proposer

    def _allows_nothing_at_exits(self, sequence: Sequence) -> bool:
        """Whether every token that shortlisted exits can predict is a stop token that is not allowed yet, or outside of
        the form.
        """
        vocab, waits = self.model.exit_vocab, sequence.num_output < sequence.params.min_tokens
        if not isinstance(vocab, Shortlist) or (not waits and sequence.grammar is None):
            return False
        predictable_ids = vocab.token_ids.cpu()
        if waits:
            predictable_ids = predictable_ids[~torch.isin(predictable_ids, torch.tensor(sorted(sequence.stop_ids)))]
        allowed = sequence.grammar.allowed(sequence.tokens, len(sequence.tokens)) if sequence.grammar else None
        return not len(predictable_ids) or (allowed is not None and not bool(allowed[predictable_ids].any()))

    def _update(self, finished: Finished) -> list[TokenStep]:
        """Adds the tokens of finished rows to their sequences, and ends the sequences that end with them."""
        steps = list[TokenStep]()
        for row, output in finished:
            sequence = row.sequence
            if not output.answers:
                continue
            if sequence.speculates and sequence.num_output:
                tokens = self._proposer_of(sequence).update(row, output)
            else:
                layer = self.segments[output.segment].last_layer
                tokens = [(output.answers[0], layer)]
            for answer, layer in tokens:
                if not sequence.finish_reason:  # drafts behind an end are dropped
                    steps.append(self._append(sequence, answer, layer))
        for sequence in {step.sequence.number: step.sequence for step in steps}.values():
            if sequence.finish_reason:
                self._finish(sequence, sequence.finish_reason)
        self._draft([(r.sequence, o) for r, o in finished if r.sequence.speculates and not r.sequence.finish_reason])
        return steps

    def _draft(self, finished: list[tuple[Sequence, RowOutput]]) -> None:
        """Adds drafts behind the tokens of a step: by the drafting head, and by prompt lookup."""
        head, read = self.head_proposer, [each for each in finished if each[0].policy.has_draft_head]
        looking = [s for s, _ in finished if s.policy.looks_up and not s.num_drafts]
        self.proposer.look_up([s for s in looking if not s.policy.has_draft_head], self._room)
        if head is not None and read:
            for sequence, _ in read:
                self._room(sequence, MOST_DRAFTS + 1)
            self.proposer.look_up([s for s in looking if s.policy.has_draft_head], self._room, head.rate)
            head.propose(read)
        for sequence, _ in finished:
            fit_drafts(sequence, self.max_pending, self.model.config.num_layers, self._room)

    def _room(self, sequence: Sequence, count: int) -> int:
        """Returns the number of further tokens that a running sequence has memory for, after reserving it for
        `count`.
        """
        self.scheduler.reserve(sequence, len(sequence.tokens) + count)
        assert sequence.slot_mapping is not None
        return len(sequence.slot_mapping.index) - len(sequence.tokens)

    def _append(self, sequence: Sequence, answer: Answer, layer: int) -> TokenStep:
        """Adds a final token to a sequence."""
        if len(sequence.tokens) == sequence.num_prompt_tokens:
            sequence.statistics.seconds_to_first_token = time.perf_counter() - sequence.added_at
        sequence.tokens.append(answer.token_id)
        sequence.statistics.exit_layers.append(layer)
        is_stop = answer.token_id in sequence.stop_ids and sequence.num_output > sequence.params.min_tokens
        if is_stop or (sequence.grammar is not None and sequence.grammar.ends_with(sequence.tokens)):
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            sequence.finish_reason = "length"
        return TokenStep(
            sequence, answer.token_id, layer, max(answer.confidence, 0.0), answer.logprob, answer.top_logprobs
        )

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if not self.scheduler.remove(sequence):
            return
        self.stage.sampler.forget(sequence)
        sequence.finish_reason = reason
        sequence.statistics.seconds = time.perf_counter() - sequence.added_at
        if not self.running and not self.waiting:
            self.link.finish()

    def _catch_up(self) -> None:
        """Computes the pending tokens of all sequences from the first segment on that has too many of them in front of
        it.
        """
        free = [s for s in self.running if s.number not in self.in_flight.busy and not s.speculates]
        for number in range(1, len(self.segments)):
            is_other_stage = self.segments[number].stage > self.segments[number - 1].stage
            limit = min(MOST_PENDING_AT_STAGE, self.max_pending) if is_other_stage else self.max_pending
            if any([s.num_pending(number) >= limit for s in free]):
                self.in_flight.catch_up([RowPlan(s, self._never, num_asked=0, num_new=0) for s in free], number)
                return
