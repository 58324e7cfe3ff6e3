"""The decoding engine: requests come and go between steps, a step takes every running sequence on, and each token leaves the network
where its own confidence lets it.

A token that leaves early lacks keys and values in the deeper pieces. Its hidden state waits at their entrance (it is *pending* there),
and runs with the next token that goes deeper, as a causal block: shallow layers never run twice, and the caches end up as a full pass
leaves them.
Every rank of TP × PP makes the same calls and runs this same loop over the same tokens; only the stage that owns a piece computes it.
"""
import time
from typing import NamedTuple

import torch

from ee_tuning.generation.block_pool import BLOCK_SIZE, blocks_for
from ee_tuning.generation.drafting import Drafting
from ee_tuning.generation.judge import Answer, Judge, Question
from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.params import SamplingParams
from ee_tuning.generation.pieces import cut_pieces
from ee_tuning.generation.policy import FULL, Policy
from ee_tuning.generation.requests import check_request
from ee_tuning.generation.runner import PieceOutput, Runner
from ee_tuning.generation.scheduler import Scheduler
from ee_tuning.generation.sequence import Sequence
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
    """By the request's measure, of the plain softmax there."""
    logprob: float | None = None
    """Of the token, in the distribution it was chosen from; None where the request does not ask."""
    top_logprobs: dict[int, float] | None = None
    """Of the likeliest tokens there."""


class Engine:
    """Decodes up to `num_slots` sequences at a time, of up to `max_length` tokens each.

    stages[p] is stage p's (first, last) layer. `cache_tokens` bounds the tokens of all sequences together; by default all can be longest.
    """

    def __init__(self, model: EarlyExitModel, stages: list[tuple[int, int]], *, num_slots: int, max_length: int, max_pending: int = 16,
                 prefill_chunk: int = 512, cache_tokens: int | None = None, eos_ids: tuple[int, ...] = (), reuses_prefixes: bool = True):
        self.model, self.topology, self.config = model, model.topology, model.config
        self.pieces = cut_pieces(stages, model.plan.exit_layers)
        self.fill_behind = FILL_BEHIND
        self.max_pending, self.prefill_chunk, self.num_slots, self.eos_ids = max_pending, prefill_chunk, num_slots, eos_ids
        tokens = num_slots * blocks_for(max_length) * BLOCK_SIZE if cache_tokens is None else cache_tokens
        self.cache = KVCache(self.config, self.topology, num_tokens=tokens, max_length=max_length, dtype=model.plan.dtype)
        self.link = StageLink(self.topology)
        self.runner = Runner(model, self.pieces, self.cache, self.link)
        self.judge = Judge(model, self.runner.heads, self.link)
        self.whole_steps = WholeSteps(self.runner)
        self.scheduler = Scheduler(self.cache, num_slots=num_slots, prefill_chunk=prefill_chunk, reuses_prefixes=reuses_prefixes)
        self.drafting = Drafting(self.runner, max_pending, self.scheduler.reserve)
        self.running, self.waiting = self.scheduler.running, self.scheduler.waiting
        self._seconds_in_asked_heads = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.running and not self.waiting

    @property
    def seconds_in_heads(self) -> float:
        """On this rank, waiting for the rank that has the head included."""
        return self._seconds_in_asked_heads + self.drafting.seconds_in_heads + self.whole_steps.seconds_in_heads

    def add_request(self, prompt: list[int], params: SamplingParams | None = None, policy: Policy = FULL) -> list[Sequence]:
        """Queues a prompt, once for each of its `n` completions; the next steps take them up as there is room, in order.

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
        added = [Sequence(tokens=list(prompt), params=params, policy=policy, limit=limit, stop_ids=stop_ids, last_piece=last_piece,
                          completion=i, added_at=time.perf_counter(), watermarks=[0] * len(self.pieces),
                          boundary=[[] for _ in self.pieces], head_watermarks=dict.fromkeys(own_layers, 0),
                          head_states={layer: [] for layer in own_layers}) for i in range(params.n)]
        self.waiting.extend(added)
        return added

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence and frees its memory, whether it runs or waits; one that has ended is left as it is."""
        if not self.scheduler.remove(sequence):
            return
        self.judge.forget(sequence)
        sequence.finish_reason = reason
        sequence.statistics.seconds = time.perf_counter() - sequence.added_at
        if self.is_idle:
            self.link.finish()

    @torch.inference_mode()
    def step(self) -> list[TokenStep]:
        """Takes every running sequence on: a token each, none for one whose prompt is still being read.

        Sequences that end with their token are out of the engine afterwards, their finish_reason says why.
        """
        self.scheduler.admit()
        steps = self._walk(self._feed())
        for sequence in {step.sequence.number: step.sequence for step in steps}.values():
            if sequence.finish_reason:
                self.abort(sequence, sequence.finish_reason)
        self._catch_up()
        return steps

    @torch.inference_mode()
    def full_model_tokens(self, tokens: list[int]) -> list[int]:
        """What the full model would say greedily after each prefix of `tokens`, from one pass over all of them. In an idle engine."""
        assert self.is_idle
        sequence, = self.add_request(tokens, SamplingParams(max_tokens=1))
        sequence.shares = False
        self.scheduler.admit()
        try:
            sequence.num_fed = len(tokens)
            for piece in range(len(self.pieces)):
                output = self.runner.run(piece, [sequence])
            (answers,) = self._ask(len(self.pieces) - 1, None, [Question(sequence, list(range(len(tokens))), 1)], output)
        finally:
            self.abort(sequence)
        return [answer.token_id for answer in answers]

    def _feed(self) -> list[Sequence]:
        """The sequences that take part in this step, their next tokens at the entrance, those that speculate with a plan."""
        going = self.scheduler.feed()
        for sequence in going:
            if sequence.speculates:
                self.drafting.begin(sequence, len(going))
        return going

    def _walk(self, going: list[Sequence]) -> list[TokenStep]:
        """Takes `going` through the pieces, each until it leaves. Pieces between which nothing is decided are one pass."""
        steps: list[TokenStep] = []
        if going and len(self.running) == len(going) and (taken := self._step_at_once(going)) is not None:
            return taken
        index = 0
        while going and index < len(self.pieces):
            # Rows that left earlier wait here with their states: they ride along, for the weights are read anyway. Drafts wait for their
            # check, which brings tokens and so is a step of their own.
            rows = [s for s in self.running if s.num_pending(index) and (s in going or not s.speculates)]
            last, asked = index, self._asked_behind(index, going)
            while not asked and self._runs_on(last, rows):
                last += 1
                asked = self._asked_behind(last, going)
            output = self.runner.run(index, rows, through=last)
            if sum(output.lengths) > len(going):
                self._count_riders(going, rows, output.lengths, last - index + 1)
            stays = [s for s in going if last < s.last_piece]
            going = self._leave(last, stays, asked, rows, output, steps) if asked else stays
            index = last + 1
        self.runner.settle()
        return steps

    def _step_at_once(self, going: list[Sequence]) -> list[TokenStep] | None:
        """A step in one call, or a round of drafts; None where the pieces have to be gone through one by one."""
        if len(going) == 1 and going[0].speculates:
            checked = self.drafting.lone_round(going[0]) if going[0].has_all_fed else None
            return None if checked is None else self._take_checked(going[0], checked)
        left = self.whole_steps.take(going)
        return None if left is None else [self._take(*each) for each in left]

    def _asked_behind(self, index: int, going: list[Sequence]) -> list[tuple[Sequence, float]]:
        """Who is asked behind a piece, and how confident it has to be to leave there."""
        asked = []
        for sequence in going:
            if sequence.num_fed == len(sequence.tokens):
                threshold = self._threshold(index, sequence, len(going))
                if threshold is not None:
                    asked.append((sequence, threshold))
        return asked

    def _runs_on(self, index: int, rows: list[Sequence]) -> bool:
        """Whether `rows`, of whom nobody is asked, go on into the piece behind `index` as they are: nobody ends there or waits there."""
        if index + 1 == len(self.pieces) or self.pieces[index].stage != self.pieces[index + 1].stage:
            return False
        layer = self.pieces[index].last_layer
        return not any(s.last_piece == index or layer in s.head_watermarks for s in rows) and not any(
            s.num_pending(index + 1) for s in self.running)

    def _count_riders(self, going: list[Sequence], rows: list[Sequence], lengths: tuple[int, ...], num_pieces: int) -> None:
        for sequence, length in zip(rows, lengths, strict=True):
            is_read = sequence in going and not sequence.has_all_fed
            if sequence.num_output and not sequence.speculates and not is_read:
                sequence.statistics.num_catch_up += (length - (sequence in going)) * num_pieces

    def _leave(self, index: int, stays: list[Sequence], wanted: list[tuple[Sequence, float]], rows: list[Sequence], output: PieceOutput,
               steps: list[TokenStep]) -> list[Sequence]:
        """Asks the heads behind a piece about the rows that want it; appends the tokens of those that leave. Returns those of `stays` that
        go on.
        """
        piece = self.pieces[index]
        questions: dict[int | None, list[Question]] = {}
        for sequence, threshold in wanted:
            place = rows.index(sequence)
            end = output.firsts[place] + output.lengths[place]
            # The check of drafts asks about the token before them and all of them; the others about their newest token.
            num_asked = sequence.num_drafts + 1 if index == sequence.last_piece else 1
            head = None if piece.last_layer == self.config.num_layers and sequence.policy.fixed_exit is None else piece.exit_layer
            question = Question(sequence, list(range(end - num_asked, end)), len(sequence.tokens) + 1 - num_asked, threshold)
            questions.setdefault(head, []).append(question)
        for head, asked in questions.items():
            for question, answers in zip(asked, self._ask(index, head, asked, output), strict=True):
                sequence = question.sequence
                # A broken model's NaN passes no threshold, but its sequences must end.
                if index == sequence.last_piece:
                    steps += self._take_checked(sequence, self.drafting.check(sequence, answers)) if sequence.speculates else [
                        self._take(sequence, answers[0], piece.last_layer)]
                    continue
                leaves = answers[0].confidence >= question.threshold
                if leaves:
                    stays.remove(sequence)
                if sequence.speculates:
                    self.drafting.note(sequence, answers[0], piece.last_layer, leaves)
                elif leaves:
                    steps.append(self._take(sequence, answers[0], piece.last_layer))
        return stays

    def _threshold(self, index: int, sequence: Sequence, num_rows: int) -> float | None:
        """The confidence at which a sequence's newest token leaves behind a piece; None where its head is not asked."""
        if index == sequence.last_piece:
            return -1.0
        if len(sequence.tokens) == sequence.num_prompt_tokens:
            return None  # reading the prompt fills every piece, so the final head's answer is paid for
        exit_layer = self.pieces[index].exit_layer
        if exit_layer is None or not sequence.speculates:
            return None if exit_layer is None else sequence.policy.thresholds.get(exit_layer)
        return self.drafting.threshold(sequence, exit_layer, num_rows)

    def _take_checked(self, sequence: Sequence, checked: list[tuple[Answer, int | None]]) -> list[TokenStep]:
        steps = []
        for answer, layer in checked:
            steps.append(self._take(sequence, answer, layer or self.config.num_layers))
            if sequence.finish_reason:
                break
        return steps

    def _ask(self, index: int, head: int | None, questions: list[Question], output: PieceOutput) -> list[list[Answer]]:
        began = time.perf_counter()
        states = [state for question in questions for state in question.states]
        inputs = self.runner.asked_states(index, head, [question.sequence for question in questions], states, output)
        answers = self.judge.ask(head, questions, inputs, self.pieces[index].stage)
        self._seconds_in_asked_heads += time.perf_counter() - began
        return answers

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
        return TokenStep(sequence, answer.token_id, layer, answer.confidence, answer.logprob, answer.top_logprobs)

    def _catch_up(self) -> None:
        """Runs the deeper pieces for everybody once a sequence has as many tokens waiting at one as may wait there.

        At the entrance of a stage they are not let pile up: it computes them while the stages before it go on with the next tokens.
        """
        for index in range(1, len(self.pieces)):
            is_other_stage = self.pieces[index].stage > self.pieces[index - 1].stage
            limit = min(self.fill_behind, self.max_pending) if is_other_stage else self.max_pending
            if any(s.num_pending(index) >= limit for s in self.running if not s.speculates):
                for deeper in range(index, len(self.pieces)):
                    rows = [s for s in self.running if s.num_pending(deeper) and not s.speculates]
                    for sequence in rows:
                        sequence.statistics.num_catch_up += sequence.num_pending(deeper)
                    self.runner.run(deeper, rows)
                return
