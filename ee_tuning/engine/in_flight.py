"""Steps in flight through the pipeline stages.

The first stage decides which rows leave in it, and sends the decision to all ranks. It goes on with those rows, while
later stages compute the others. A later stage runs all rows that it receives to their end; stage p's decisions are read
p engine steps after the step began. Between these moments all ranks have the same state. A single stage is the case
without later stages.
"""

from collections import deque
from collections.abc import Set

import torch

from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.model_runner import ModelRunner
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.step_message import message_size, pack, unpack
from ee_tuning.engine.step_plan import NOT_EXITED, RowOutput, RowPlan
from ee_tuning.parallel.stage_link import StageLink

Finished = list[tuple[RowPlan, RowOutput]]
"""Rows that have finished a step. The output of a row for which no head was asked has no segment."""


class InFlightStep:
    """One step. All ranks call `advance` at the same moments."""

    def __init__(self, runner: ModelRunner, link: StageLink, rows: list[RowPlan], begun: int):
        """`begun` is the number of the engine's step."""
        self._runner, self._link, self._rows, self._begun = runner, link, rows, begun
        self.remaining = rows
        """Rows that have not finished the step, as far as all ranks know."""
        self._next_stage = 0
        self._states: PassStates | None = None
        self._undecided: tuple[int, list[RowOutput] | None] | None = None
        """The stage whose decisions some ranks do not know yet, with the outputs on its own ranks."""

    @property
    def due(self) -> int:
        """The engine step at which the decisions of the awaited stage are read."""
        return self._begun + (self._undecided[0] if self._undecided else 0)

    def advance(self) -> Finished:
        """Continues to the next stage after the first one that decides anything. Returns the rows finished since the
        last call, shallow ones first; `remaining` is empty at the end.
        """
        finished: Finished = []
        if self._undecided is not None:
            stage, outputs = self._undecided
            self._undecided = None
            finished += self._settle(stage, self._agreed(stage, outputs))
        while self.remaining and self._undecided is None:
            stage, self._next_stage = self._next_stage, self._next_stage + 1
            self._rows = self.remaining
            outputs = self._run(stage)
            if stage == 0 or not self._decides(stage):
                finished += self._settle(stage, self._agreed(stage, outputs))
            else:
                self._undecided = stage, outputs
        return finished

    def _run(self, stage: int) -> list[RowOutput] | None:
        """Runs this rank's part of a stage: the stage itself, or the sending of states to it from the stage before."""
        runner, numbers, own = self._runner, self._runner.stage.segments_of(stage), self._runner.stage.topology.stage
        heads, message = runner.heads, None
        if stage > 0 and own == stage - 1:
            self._link.send(runner.hand_over(self._rows, numbers[0], self._states))
            if heads.num_fused(self._rows, stage):
                self._link.send(heads.fused_message(self._rows, stage))
        if own != stage:
            return None
        if stage > 0:
            count = sum([row.sequence.num_pending(numbers[0]) for row in self._rows])
            message = self._link.receive(count, runner.width_of_message(self._rows), runner.stage.model.plan.dtype)
            if count := heads.num_fused(self._rows, stage):
                said = self._link.receive(count, runner.stage.model.vocab.size, heads.fused_dtype)
                heads.take_fused(self._rows, stage, said)
        entering = runner.take_over(self._rows, numbers[0], message)
        outputs, self._states = runner.run(self._rows, numbers, entering, active=self._rows, fills=stage > 0)
        for output in outputs if runner.stage.model.plan.drafts else ():
            output.read_states = runner.read_states
        if runner.stage.topology.num_in_replica > 1 and self._decides(stage):
            self._link.send_decision(torch.tensor(pack(self._rows, numbers, outputs), dtype=torch.float64), stage)
        return outputs

    def _agreed(self, stage: int, own: list[RowOutput] | None) -> list[RowOutput]:
        """Returns the outputs of a stage, on every rank those of the stage's first rank."""
        if own is not None and (self._runner.stage.topology.num_in_replica == 1 or self._link.is_source(stage)):
            return own
        if not self._decides(stage):
            return own or [RowOutput() for _ in self._rows]
        numbers = self._runner.stage.segments_of(stage)
        message = torch.empty(message_size(self._rows, numbers), dtype=torch.float64)
        self._link.recv_decision(message, stage)
        outputs = unpack(self._rows, numbers, message.tolist())
        for output, mine in zip(outputs, own or (), strict=False):
            output.read_states = mine.read_states
        return outputs

    def _decides(self, stage: int) -> bool:
        """Whether a head of this stage is asked about any row."""
        return message_size(self._rows, self._runner.stage.segments_of(stage)) > 0

    def _settle(self, stage: int, outputs: list[RowOutput]) -> Finished:
        numbers = self._runner.stage.segments_of(stage)
        if self._runner.stage.topology.stage != stage:
            self._runner.follow(self._rows, numbers, outputs, active=self._rows, fills=stage > 0)
        finished = [
            (row, output)
            for row, output in zip(self._rows, outputs, strict=True)
            if output.segment != NOT_EXITED or row.last_segment in numbers
        ]
        done = {row for row, _ in finished}
        self.remaining = [row for row in self._rows if row not in done]
        return sorted(finished, key=lambda each: each[1].segment) if len(finished) > 1 else finished


class InFlightSteps:
    """The steps in flight of an engine: over several stages, those with rows that later stages decide about."""

    def __init__(self, runner: ModelRunner, link: StageLink):
        self.runner, self._link = runner, link
        self._steps: deque[InFlightStep] = deque()
        """Steps in the order in which they reached the stage that they wait for, which is also the order of its
        decisions.
        """
        self._held: list[Sequence] = []
        """Sequences that a step left out."""
        self._clock = 0
        self.busy: Set[int] = frozenset()
        """Numbers of the sequences that wait for a later stage."""

    def __len__(self) -> int:
        return len(self._steps)

    def start(self, rows: list[RowPlan]) -> Finished:
        """Begins a step of `rows` and returns the rows that finish in the first stage."""
        return self._advance(InFlightStep(self.runner, self._link, self._share_of(rows), self._clock)) if rows else []

    def finish_due(self) -> Finished:
        """Ends a step of the engine: reads the decisions that are due."""
        finished: Finished = []
        while self._steps and self._steps[0].due <= self._clock:
            finished += self.advance()
        self._clock += 1
        return finished

    def advance(self) -> Finished:
        """Advances the oldest step by one stage's decisions."""
        return self._advance(self._steps.popleft())

    def finish(self) -> Finished:
        """Runs all steps to their end."""
        finished: Finished = []
        while self._steps:
            finished += self.advance()
        return finished

    def catch_up(self, rows: list[RowPlan], first: int) -> None:
        """Computes the pending tokens of `rows` from segment `first` on. None of the rows is in another step."""
        runner, outputs = self.runner, [RowOutput() for _ in rows]
        for stage in range(runner.stage.segments[first].stage, runner.stage.topology.pp):
            of_stage = runner.stage.segments_of(stage)
            numbers, own = range(max(first, of_stage[0]), of_stage[-1] + 1), runner.stage.topology.stage
            count = sum([row.sequence.num_pending(numbers[0]) for row in rows])
            crosses = numbers[0] == of_stage[0] and stage > 0 and count > 0
            if crosses and own == stage - 1:
                self._link.send(runner.hand_over(rows, numbers[0], None))
            if own == stage:
                width, dtype = runner.stage.config.hidden_size, runner.stage.model.plan.dtype
                entering = self._link.receive(count, width, dtype) if crosses else None
                runner.run(rows, numbers, entering, active=[], fills=True)
            else:
                runner.follow(rows, numbers, outputs, active=[], fills=True)

    def _share_of(self, rows: list[RowPlan]) -> list[RowPlan]:
        """Returns the rows that begin a step. If none of them can leave in the first stage, one step of all rows would
        keep only one stage busy at a time, so the rows are divided among as many steps as there are stages. Rows that
        were left out come first the next time.
        """
        if self.runner.stage.topology.pp == 1:
            return rows
        held = [row for row in rows if row.sequence in self._held]
        self._held = []
        num_busy = self._num_busy_stages(rows)
        if num_busy == 1 or message_size(rows, self.runner.stage.segments_of(0)):
            return rows
        rows = [*held, *(row for row in rows if row not in held)]
        share = -(-(len(rows) + len(self.busy)) // num_busy)
        self._held = [row.sequence for row in rows[share:]]
        return rows[:share]

    def _num_busy_stages(self, rows: list[RowPlan]) -> int:
        """Returns the number of stages with layers that the rows go through."""
        last = max(row.last_segment for row in rows)
        segments = self.runner.stage.segments[: last + 1]
        return len({segment.stage for segment in segments if segment.first_layer <= segment.last_layer})

    def _advance(self, step: InFlightStep) -> Finished:
        finished = step.advance()
        if step.remaining:
            self._steps.append(step)
        if self._steps or self.busy:
            self.busy = {row.sequence.number for each in self._steps for row in each.remaining}
        return finished
