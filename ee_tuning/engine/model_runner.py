"""The decode loop of one pipeline stage: each row runs through its segments until a head is confident enough.

Where the CPU kernels serve, one call of them runs the same loop (`native_step.py`).
"""

import torch
from torch import Tensor

from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.head_runner import HeadRunner, ToSample
from ee_tuning.engine.native_step import NativeStage
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import NOT_EXITED, RowOutput, RowPlan
from ee_tuning.model.exit_head import ExitInput

# t tokens of a pass · h hidden


class ModelRunner:
    """Runs the segments of one stage."""

    def __init__(self, stage: StageModel):
        self.stage, self.heads = stage, HeadRunner(stage)
        self.native = NativeStage(stage) if stage.is_native else None
        """The stage for the CPU kernels; None where these do not support it."""
        self.read_states: dict[int, PassStates] = {}
        """The newest step's states behind the layers that a drafting head reads, those of earlier stages included; 0 is
        the embedding.
        """

    def run(
        self,
        rows: list[RowPlan],
        numbers: range,
        entering: Tensor | None = None,
        *,
        active: list[RowPlan],
        fills: bool,
    ) -> tuple[list[RowOutput], PassStates | None]:
        """Runs the pending tokens of `rows` through the segments `numbers` of this stage.

        `active` are the rows that may leave: all of them in a decoding step, none in a catch-up step. With `fills`
        pending tokens go through all segments, wherever rows leave; otherwise as deep as any row goes. `entering` [t,
        h] are the states in front of the first segment, row after row; without them tokens are embedded, or their
        states lie in the boundary ring.

        Returns the output of each row, and the states behind the last segment of the rows that go on in the next stage,
        unless the ring has them.
        """
        before = [_num_computed(row, numbers) for row in rows]
        states = None if entering is None else self._entering(rows, numbers[0], entering)
        if self.native is not None and self.native.serves(rows, active, numbers):
            if states is not None:
                self.stage.ring.write(numbers[0], states, states.rows)
            starts = self._starts_of_read(rows, numbers)
            outputs, states = self.native.run(rows, active, numbers, fills), None
            self.heads.bound_all(numbers, [row.sequence for row in rows])
            self._read_ring(rows, starts)
        else:
            outputs, states = self._run_segments(rows, active, numbers, states, fills)
        _count_catch_up(rows, active, outputs, numbers, before)
        return outputs, states

    def follow(
        self, rows: list[RowPlan], numbers: range, outputs: list[RowOutput], *, active: list[RowPlan], fills: bool
    ) -> None:
        """Counts the tokens that another stage computed, as `run` did there."""
        before = [_num_computed(row, numbers) for row in rows]
        segment_of, still_active = dict(zip(rows, outputs, strict=True)), list(active)
        for number in numbers:
            if not (still_active or fills):
                break
            members = [row for row in rows if (row.rides or row in still_active) and row.sequence.num_pending(number)]
            for row in members:
                row.sequence.num_computed[number] = row.sequence.num_arrived(number)
            asked = [row.sequence for row in still_active if row.is_asked(number)]
            self.heads.follow(number, [row.sequence for row in members], asked)
            still_active = [
                row for row in still_active if segment_of[row].segment != number and number < row.last_segment
            ]
        _count_catch_up(rows, active, outputs, numbers, before)

    def hand_over(self, rows: list[RowPlan], boundary: int, states: PassStates | None) -> Tensor:  # [t, (1 + a) h]
        """Returns the states of pending tokens of `rows` in front of the next stage's first segment. If a drafting head
        reads any row, the states of a earlier layers stand beside them.
        """
        sequences = [row.sequence for row in rows if row.sequence.num_pending(boundary)]
        starts = [s.num_computed[boundary] for s in sequences]
        stops = [s.num_arrived(boundary) for s in sequences]
        hidden = self.stage.ring.read(boundary, sequences, starts, stops, states)
        if not any([row.is_read for row in rows]):
            return hidden
        return torch.cat([hidden, *(self.read_states[n].hidden for n in self.stage.model.plan.carried)], dim=-1)

    def width_of_message(self, rows: list[RowPlan]) -> int:
        """Returns the width of the message from the stage before."""
        is_read = any([row.is_read for row in rows])
        return self.stage.config.hidden_size * (1 + is_read * len(self.stage.model.plan.brought))

    def take_over(self, rows: list[RowPlan], first: int, message: Tensor | None) -> Tensor | None:  # [t, h]
        """Takes the message of the stage before, and returns the states in front of segment `first`; begins the states
        that a drafting head reads of a step.
        """
        self.read_states, plan = {}, self.stage.model.plan
        if message is None or not any([row.is_read for row in rows]):
            return message
        entering, *brought = message.split(self.stage.config.hidden_size, dim=-1)
        read = dict(zip(plan.brought, brought, strict=True))
        if plan.first_layer - 1 in plan.aux_layers:
            read[plan.first_layer - 1] = entering
        self.read_states = {layer: self._entering(rows, first, states) for layer, states in read.items()}
        return entering.contiguous()

    def _run_segments(
        self, rows: list[RowPlan], active: list[RowPlan], numbers: range, states: PassStates | None, fills: bool
    ) -> tuple[list[RowOutput], PassStates | None]:
        """The decode loop. Neighbouring segments between which nothing happens are one pass."""
        outputs, to_sample = {row: RowOutput() for row in rows}, list[ToSample]()
        first = numbers[0]
        while first <= numbers[-1] and (active or fills):
            members = [row for row in rows if (row.rides or row in active) and row.sequence.num_pending(first)]
            last = self._end_of_pass(first, numbers[-1], rows, members, active)
            states = None if not members else states
            if members:
                states, exit_input = self._pass(first, last, [row.sequence for row in members], states)
                asked = [row for row in active if row.is_asked(last)]
                to_sample += self.heads.ask(last, asked, states, exit_input, outputs) if asked else []
                self.heads.keep(last, states, asked)
                # A draft is checked by the final head later.
                fused = [row for row in active if row.is_fused_at(last)]
                fused = [row for row in fused if row.sequence.speculates or outputs[row].segment == NOT_EXITED]
                self.heads.keep_fused_logits(last, fused, states, exit_input)
            exited = [row for row in active if outputs[row].segment == last]
            active = [row for row in active if row not in exited and last < row.last_segment]
            if states is not None and last + 1 < len(self.stage.segments):
                self._make_pending(last + 1, states, [row for row in exited if not row.rides])
            first = last + 1
        if states is not None and first < len(self.stage.segments):
            self._make_pending(first, states, [row for row in rows if row.rides and row not in active])
        self.heads.sample(to_sample)
        return [outputs[row] for row in rows], states

    def _entering(self, rows: list[RowPlan], first: int, hidden: Tensor) -> PassStates:
        sequences = [row.sequence for row in rows]
        starts = [s.num_computed[first] for s in sequences]
        return PassStates(sequences, starts, [s.num_pending(first) for s in sequences], hidden)

    def _end_of_pass(
        self, first: int, stop: int, rows: list[RowPlan], members: list[RowPlan], active: list[RowPlan]
    ) -> int:
        """Returns the last segment that one pass can run together with segment `first`: in between no head is asked or
        has its own layer, no row ends, and no token is pending.
        """
        for number in range(first, stop):
            if (
                any([row.is_asked(number) or row.is_fused_at(number) for row in active])
                or any([row.last_segment == number or row.sequence.keeps_own(number) for row in members])
                or any([row.sequence.num_pending(number + 1) for row in rows])
                or (self.stage.segments[number].is_read and any([row.is_read for row in members]))
            ):
                return number
        return stop

    def _pass(
        self, first: int, last: int, rows: list[Sequence], states: PassStates | None
    ) -> tuple[PassStates, ExitInput]:
        """Runs pending tokens through segments. The result is valid until the next pass."""
        stage = self.stage
        starts, stops = [s.num_computed[first] for s in rows], [s.num_arrived(first) for s in rows]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        is_embedded = first == 0 and states is None
        hidden = (
            stage.embed(rows, starts, lengths) if is_embedded else stage.ring.read(first, rows, starts, stops, states)
        )
        if first == 0 and stage.reads_embedding:
            self.read_states[0] = PassStates(rows, starts, lengths, hidden)
        hidden, exit_input = stage.layers_of(first, last)(hidden, stage.describe(rows, starts, lengths))
        for sequence, stop in zip(rows, stops, strict=True):
            for number in range(first, last + 1):
                sequence.num_computed[number] = stop
        states = PassStates(rows, starts, lengths, hidden)
        if stage.segments[last].is_read:
            self.read_states[stage.segments[last].last_layer] = states
        return states, exit_input

    def _starts_of_read(self, rows: list[RowPlan], numbers: range) -> dict[int, list[int]]:
        """Returns the first token that each row computes in segments whose states a drafting head reads."""
        if not any([row.is_read for row in rows]):
            return {}
        read = [number for number in numbers if self.stage.segments[number].is_read]
        return {number: [row.sequence.num_computed[number] for row in rows] for number in read}

    def _read_ring(self, rows: list[RowPlan], starts: dict[int, list[int]]) -> None:
        """Takes the states that a drafting head reads from the boundary ring."""
        for number, firsts in starts.items():
            sequences = [row.sequence for row in rows]
            stops = [s.num_computed[number] for s in sequences]
            hidden = self.stage.ring.read(number + 1, sequences, firsts, stops, None)
            lengths = [stop - first for first, stop in zip(firsts, stops, strict=True)]
            layer = self.stage.segments[number].last_layer
            self.read_states[layer] = PassStates(sequences, firsts, lengths, hidden)

    def _make_pending(self, boundary: int, states: PassStates, rows: list[RowPlan]) -> None:
        """Keeps the states of rows that go deeper than segment `boundary` - 1, but not in this step."""
        self.stage.ring.write(boundary, states, [row.sequence for row in rows if row.sequence.num_pending(boundary)])


def _num_computed(row: RowPlan, numbers: range) -> int:
    return sum(row.sequence.num_computed[numbers[0] : numbers[-1] + 1])


def _count_catch_up(
    rows: list[RowPlan], active: list[RowPlan], outputs: list[RowOutput], numbers: range, before: list[int]
) -> None:
    """Counts tokens that left the network, in this step or an earlier one, and were computed deeper."""
    still_active = {*active}
    for row, output, count in zip(rows, outputs, before, strict=True):
        if row.sequence.speculates:
            continue
        last = min(row.last_segment if output.segment == NOT_EXITED else output.segment, numbers[-1])
        own = row.num_new * (last + 1 - numbers[0]) if row in still_active else 0
        row.sequence.statistics.num_catch_up += _num_computed(row, numbers) - count - own
