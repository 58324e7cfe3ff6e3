"""Runs a stage's part of a step: rows through its segments, each until the head behind one is sure enough.

`ModelRunner.run` is the decode loop. Where the CPU kernels serve, one call of them runs the same loop
(`native_step.py`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ee_tuning.decoding.decode_head import DecodeExitHead, DecodeHead
from ee_tuning.generation.boundary_ring import PassStates
from ee_tuning.generation.native_step import NativeStage
from ee_tuning.generation.sampler import SampleRequest
from ee_tuning.generation.sequence import NOT_KEPT, Sequence
from ee_tuning.generation.stage_model import StageModel
from ee_tuning.generation.step_plan import NOT_EXITED, Answer, ExitAnswer, RowOutput, RowPlan
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.shortlist import token_confidences, token_logits

# t tokens of a pass · h hidden · q states that a head is asked about


class ModelRunner(StageModel):
    """Runs the segments of one stage."""

    _native: NativeStage | None = None

    def run(
        self,
        rows: list[RowPlan],
        numbers: range,
        entering: Tensor | None = None,
        *,
        is_catch_up: bool = False,
        fills: bool = False,
    ) -> tuple[list[RowOutput], PassStates | None]:
        """Runs the pending tokens of `rows` through the segments `numbers` of this stage.

        `entering` [t, h] are the states of pending tokens in front of the first one, row after row; without them tokens
        are embedded, or lie in the boundary ring. A row of a catch-up step wants to leave nowhere. With `fills` pending
        tokens go through all segments, wherever rows leave; else as deep as any row goes. Returns the outcome of each
        row, and the states behind the last segment of rows that go on in the next stage, where the ring has them not.
        """
        before = [_computed(row, numbers) for row in rows]
        states = None if entering is None else self._entering(rows, numbers[0], entering)
        active = [] if is_catch_up else list(rows)
        if (native := self.native_stage()) is not None and native.serves(rows, active, numbers):
            if states is not None:
                self.ring.write(numbers[0], states, states.rows)
            outputs = native.run(rows, active, numbers, fills or is_catch_up)
            states = None
            for number in self.own_layers.intersection(numbers):
                self._bound_own(number, rows, None)
        else:
            outputs, states = self._run_segments(rows, active, numbers, states, fills or is_catch_up)
        _count_catch_up(rows, active, outputs, numbers, before)
        return outputs, states

    def follow(
        self,
        rows: list[RowPlan],
        numbers: range,
        outputs: list[RowOutput],
        *,
        is_catch_up: bool = False,
        fills: bool = False,
    ) -> None:
        """Counts what another stage computed, as `run` did there."""
        before = [_computed(row, numbers) for row in rows]
        active = [] if is_catch_up else list(zip(rows, outputs, strict=True))
        for number in numbers:
            if not (active or fills or is_catch_up):
                break
            asked = {row.sequence for row, _ in active if row.is_asked(number)}
            going = {row for row, _ in active}
            members = [r.sequence for r in rows if (r.rides or r in going) and r.sequence.num_pending(number)]
            for sequence in members:
                sequence.num_computed[number] = sequence.num_arrived(number)
                if sequence.num_own_computed[number] != NOT_KEPT and sequence in asked:
                    sequence.num_own_computed[number] = sequence.num_computed[number]
            for sequence in members:
                if self._is_own_late(sequence, number):
                    sequence.num_own_computed[number] = sequence.num_computed[number] - 1
            active = [
                (row, output)
                for row, output in active
                if output.segment not in range(numbers[0], number + 1) and number < row.last_segment
            ]
        _count_catch_up(rows, [] if is_catch_up else rows, outputs, numbers, before)

    def hand_over(self, rows: list[RowPlan], boundary: int, states: PassStates | None) -> Tensor:  # [t, h]
        """States of pending tokens of `rows` in front of the next stage's first segment."""
        sequences = [row.sequence for row in rows]
        starts = [s.num_computed[boundary] for s in sequences]
        return self.ring.read(boundary, sequences, starts, [s.num_arrived(boundary) for s in sequences], states)

    def native_stage(self) -> NativeStage | None:
        """This stage as the CPU kernels take it; None where they do not serve."""
        if self.is_native and self._native is None:
            self._native = NativeStage(self)
        return self._native

    def _run_segments(
        self, rows: list[RowPlan], active: list[RowPlan], numbers: range, states: PassStates | None, fills: bool
    ) -> tuple[list[RowOutput], PassStates | None]:
        """The decode loop."""
        outputs = {row: RowOutput() for row in rows}
        to_sample: list[tuple[RowOutput, list[SampleRequest]]] = []
        first = numbers[0]
        while first <= numbers[-1] and (active or fills):
            members = [r for r in rows if (r.rides or r in active) and r.sequence.num_pending(first)]
            last = self._end_of_pass(first, numbers[-1], rows, members, active)
            if members:
                states, exit_input = self._pass(first, last, [row.sequence for row in members], states)
                asked = [row for row in active if row.is_asked(last)]
                if asked:
                    with self._time_in_heads():
                        self._ask(last, asked, states, exit_input, outputs, to_sample)
                self._keep_own(last, states, asked)
            else:
                states = None
            exited = [row for row in active if outputs[row].segment != NOT_EXITED]
            active = [row for row in active if row not in exited and last < row.last_segment]
            if states is not None and (waiting := [row.sequence for row in exited if not row.rides]):
                self.ring.write(last + 1, states, [s for s in waiting if last < s.last_segment])
            first = last + 1
        if states is not None and first < len(self.segments):
            exited = [row for row in rows if row.rides and row not in active]
            self.ring.write(first, states, [row.sequence for row in exited if row.sequence.num_pending(first)])
        for output, requests in to_sample:
            output.answers += self.sampler.sample(requests)
        return [outputs[row] for row in rows], states

    def _entering(self, rows: list[RowPlan], first: int, hidden: Tensor) -> PassStates:
        sequences = [row.sequence for row in rows]
        starts = [s.num_computed[first] for s in sequences]
        return PassStates(sequences, starts, [s.num_pending(first) for s in sequences], hidden)

    def _end_of_pass(
        self, first: int, stop: int, rows: list[RowPlan], members: list[RowPlan], active: list[RowPlan]
    ) -> int:
        """The last segment that can run in one pass with segment `first`: nothing is asked, ends or waits in
        between.
        """
        for number in range(first, stop):
            if (
                any([row.is_asked(number) for row in active])
                or any([r.last_segment == number or r.sequence.num_own_computed[number] != NOT_KEPT for r in members])
                or any([row.sequence.num_pending(number + 1) for row in rows])
            ):
                return number
        return stop

    def _pass(
        self, first: int, last: int, rows: list[Sequence], states: PassStates | None
    ) -> tuple[PassStates, ExitInput]:
        """One pass of pending tokens through segments; what it returns is for use before the next pass."""
        starts = [s.num_computed[first] for s in rows]
        stops = [s.num_arrived(first) for s in rows]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        if first == 0 and states is None:
            hidden = self.embed(rows, starts, lengths)
        else:
            hidden = self.ring.read(first, rows, starts, stops, states)
        hidden, exit_input = self.layers_of(first, last)(hidden, self.describe(rows, starts, lengths))
        for sequence, stop in zip(rows, stops, strict=True):
            for number in range(first, last + 1):
                sequence.num_computed[number] = stop
        return PassStates(rows, starts, lengths, hidden), exit_input

    def _ask(
        self,
        number: int,
        asked: list[RowPlan],
        states: PassStates,
        exit_input: ExitInput,
        outputs: dict[RowPlan, RowOutput],
        to_sample: list[tuple[RowOutput, list[SampleRequest]]],
    ) -> None:
        """Asks the head behind segment `number`, and lets rows leave that it is sure enough of."""
        head = self.heads[number]
        counts = [row.num_asked if number == row.last_segment else 1 for row in asked]
        logits, top = head.ask(self._head_input(number, asked, counts, states, exit_input))
        first, wanted = 0, list[tuple[RowPlan, int, float]]()
        told = self._confidences(head, asked, counts, logits, top).tolist()
        for row, count in zip(asked, counts, strict=True):
            own, output, is_last = told[first : first + count], outputs[row], number == row.last_segment
            leaves = is_last or own[0][1] >= row.thresholds[number]
            if leaves:
                output.segment = number
            if leaves and row.is_plain_greedy:
                output.answers = [Answer(confidence, int(token)) for token, confidence in own]
            elif leaves:
                wanted += [(row, first + i, own[i][1]) for i in range(count)]
            if row.sequence.speculates and not is_last:
                output.asked.append(ExitAnswer(number, int(own[0][0]), own[0][1]))
            first += count
        if wanted:
            places = [place for _, place, _ in wanted]
            whole = token_logits(logits[places], head.vocab).cpu()
            _collect(wanted, whole, outputs, to_sample)

    def _confidences(
        self, head: DecodeHead, asked: list[RowPlan], counts: list[int], logits: Tensor, top: Tensor
    ) -> Tensor:  # [q, 2] float64
        """Likeliest token and confidence of each state, by the measure of its request."""
        first = 0
        for row, count in zip(asked, counts, strict=True):
            if (measure := row.sequence.policy.measure) != "max_probability":
                top[first : first + count, 1] = token_confidences(logits[first : first + count], head.vocab, measure)
            first += count
        return top

    def _head_input(
        self, number: int, asked: list[RowPlan], counts: list[int], states: PassStates, exit_input: ExitInput
    ) -> ExitInput:  # [q, h]
        """The input of the head behind segment `number` for the newest `counts` tokens of each row."""
        if number in self.own_layers:
            return self._run_own(number, [row.sequence for row in asked], num_left=0, states=states)
        head = self.heads[number]
        inputs = head.take(states.hidden, exit_input) if isinstance(head, DecodeExitHead) else ExitInput(states.hidden)
        ends, end = dict[int, int](), 0
        for sequence, length in zip(states.rows, states.lengths, strict=True):
            ends[sequence.number] = end = end + length
        places = [
            place
            for row, count in zip(asked, counts, strict=True)
            for place in range(ends[row.sequence.number] - count, ends[row.sequence.number])
        ]
        return inputs if places == list(range(end)) else inputs.rows(places)

    def _keep_own(self, number: int, states: PassStates, asked: list[RowPlan]) -> None:
        """Keeps the states of tokens that the head behind segment `number` has not been asked about, for the layer of
        its own.
        """
        if number in self.own_layers:
            answered = {row.sequence.number for row in asked}
            kept = [s for s in states.rows if s.num_own_computed[number] != NOT_KEPT and s.number not in answered]
            self._bound_own(number, kept, states)
            self.ring.write(number + 1, states, kept)

    def _bound_own(self, number: int, rows: list[Sequence] | list[RowPlan], states: PassStates | None) -> None:
        """Runs a head's own layer for rows that have not asked it for long. Their newest token may be asked about
        yet.
        """
        sequences = [row.sequence if isinstance(row, RowPlan) else row for row in rows]
        if late := [s for s in sequences if self._is_own_late(s, number)]:
            self._run_own(number, late, num_left=1, states=states)

    def _is_own_late(self, sequence: Sequence, number: int) -> bool:
        if sequence.num_own_computed[number] == NOT_KEPT:
            return False
        # A prompt's tokens are computed at once, so that other requests can share them.
        most = 1 if sequence.num_scheduled <= sequence.num_to_prefill else self.max_pending
        return sequence.num_computed[number] - sequence.num_own_computed[number] > most

    def _run_own(
        self, number: int, rows: list[Sequence], *, num_left: int, states: PassStates | None
    ) -> ExitInput:  # [rows, h]
        """Runs a head's own layer over all tokens that it lacks but the newest `num_left`; the last one's output."""
        starts = [s.num_own_computed[number] for s in rows]
        stops = [s.num_computed[number] - num_left for s in rows]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        hidden = self.ring.read(number + 1, rows, starts, stops, states)
        for sequence, stop in zip(rows, stops, strict=True):
            sequence.num_own_computed[number] = stop
        output = self.own_layer_of(number)(hidden, self.describe(rows, starts, lengths))[0]
        made = ExitInput(hidden, layer_output=output)
        ends = torch.tensor(lengths).cumsum(0) - 1
        return made if max(lengths) == 1 else made.rows(ends.tolist())

    @contextmanager
    def _time_in_heads(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds_in_heads += time.perf_counter() - began


def _collect(
    wanted: list[tuple[RowPlan, int, float]],
    logits: Tensor,  # [wanted, v]
    outputs: dict[RowPlan, RowOutput],
    to_sample: list[tuple[RowOutput, list[SampleRequest]]],
) -> None:
    """Notes the tokens that the sampler has to choose, row by row."""
    requests: dict[RowPlan, list[SampleRequest]] = {}
    for (row, _, confidence), scores in zip(wanted, logits, strict=True):
        own = requests.setdefault(row, [])
        length = len(row.sequence.tokens) + len(own)
        own.append(SampleRequest(row.sequence, length, confidence, scores))
    for row, own in requests.items():
        first = len(own) - 1
        to_sample.append((outputs[row], [each._replace(length=each.length - first) for each in own]))


def _computed(row: RowPlan, numbers: range) -> int:
    return sum(row.sequence.num_computed[numbers[0] : numbers[-1] + 1])


def _count_catch_up(
    rows: list[RowPlan], active: list[RowPlan], outputs: list[RowOutput], numbers: range, before: list[int]
) -> None:
    """Counts tokens that left in an earlier step, or in this one, and were computed deeper."""
    going = {*active}
    for row, output, count in zip(rows, outputs, before, strict=True):
        if row.sequence.speculates:
            continue
        last = min(row.last_segment if output.segment == NOT_EXITED else output.segment, numbers[-1])
        own = row.num_new * (last + 1 - numbers[0]) if row in going else 0
        row.sequence.statistics.num_catch_up += _computed(row, numbers) - count - own
