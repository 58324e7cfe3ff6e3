"""A stage's part of a step in one call of the CPU kernels (`kernel/step.h`): Python code between two segments would
take longer than a shallow segment.
"""

import ctypes
from array import array
from collections.abc import Set

import torch
from torch import Tensor

from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.engine.sampler import SampleRequest
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, ExitAnswer, RowOutput, RowPlan
from ee_tuning.kernel import calls
from ee_tuning.parallel.shortlist import token_logits
from ee_tuning.parallel.time_parts import part

# q states that a head is evaluated on · v vocabulary

MOST_TOKENS = 4 * calls.MOST_TOKENS
"""Tokens of a step, pending ones included."""


class NativeStage:
    """The segments of a stage as the kernels take them."""

    def __init__(self, stage: StageModel):
        self._stage, self._numbers = stage, stage.segments_of(stage.topology.stage)
        self._first = self._numbers[0]
        self._embedding = stage.embed.table
        self._whole = {number for number, head in stage.heads.items() if head.is_fully_native}
        self._segments: dict[tuple[int, frozenset[int]], ctypes.Array[calls.Segment]] = {}
        ends = range(self._numbers[0], min(self._numbers[-1] + 1, len(stage.segments) - 1) + 1)
        rings = [
            stage.ring.ring(number).data_ptr() if number and number in ends else None
            for number in range(self._numbers[0], self._numbers[-1] + 2)
        ]
        self._rings = (ctypes.c_void_p * len(rings))(*rings)
        widest = max((head.native.num_rows for head in stage.heads.values() if head.native is not None), default=1)
        self._logits_shape = (widest, torch.promote_types(stage.model.plan.dtype, torch.float32))
        self._embedding_address = None if self._embedding is None else self._embedding.data_ptr()
        self._keeps_read = not {0, stage.config.num_layers} & {*stage.model.plan.aux_layers}
        """Whether the boundary ring has the states behind all layers that a drafting head reads."""
        # For all steps: constant fields are filled in once.
        self._rows, self._step = (calls.StepRow * calls.MOST_TOKENS)(), calls.Step()
        self._step.rows, self._step.rings = self._rows, ctypes.addressof(self._rings)
        self._step.capacity = stage.ring.capacity
        self._step.cos, self._step.sin = (table.data_ptr() for table in stage.tables)

    def serves(self, rows: list[RowPlan], active: list[RowPlan], numbers: range) -> bool:
        """Whether the kernels support everything that these rows ask for, and there are few enough tokens for them to
        be faster.
        """
        if len(rows) > calls.MOST_TOKENS or (self._embedding is None and numbers[0] == 0):
            return False
        if not self._keeps_read and any([row.is_read for row in rows]):
            return False
        first, most, total = numbers[0], self._stage.ring.capacity - self._stage.max_pending, 0
        for row in rows:
            sequence = row.sequence
            num_entering = sequence.num_pending(first)
            if num_entering > most or (num_entering > 1 and sequence.own_layers and row.num_new > 1):
                return False
            total += sequence.num_arrived(first) - sequence.num_computed[min(numbers[-1], row.last_segment)]
        if total > MOST_TOKENS or sum([row.num_new for row in active]) > calls.MOST_TOKENS:
            return False
        return all([self._has_heads(row, numbers) for row in active])

    def _has_heads(self, row: RowPlan, numbers: range) -> bool:
        if row.sequence.policy.measure != "max_probability" or row.sequence.fused_segments:
            return False
        stop = min(numbers[-1], row.last_segment) + 1
        return all([n in self._whole for n in range(numbers[0], stop) if row.is_asked(n) and n in self._stage.heads])

    @part("layers and heads (CPU kernels)")
    def run(self, rows: list[RowPlan], active: list[RowPlan], numbers: range, fills: bool) -> list[RowOutput]:
        """See `ModelRunner.run`: states come from the boundary ring, and go there."""
        still_active = {*active}
        own = frozenset([number for row in rows if row.sequence.own_layers for number in row.sequence.own_layers])
        segments, shape = self._segments_to(max([row.last_segment for row in rows]), own)
        memory = _StepMemory(rows, still_active, len(numbers), self._logits_shape)
        for place, row in enumerate(rows):
            self._fill_row(self._rows[place], row, row in still_active, numbers[0], memory, place)
        step = self._step
        step.num_threads, step.num_rows, step.num_segments = torch.get_num_threads(), len(rows), len(segments)
        step.first, step.is_fill, step.segments = numbers[0] - self._first, fills, segments
        step.reads = any([row.is_read for row in rows])
        step.embedding = self._embedding_address if numbers[0] == 0 else None
        calls.run_step(shape, step, self._stage.model.plan.dtype)
        self._stage.seconds_in_heads += step.seconds_in_heads
        outputs = [self._output(row, self._rows[place], memory, place) for place, row in enumerate(rows)]
        if memory.logits is not None:
            self._sample(rows, outputs, memory)
        return outputs

    def _fill_row(
        self, native: calls.StepRow, row: RowPlan, is_active: bool, first: int, memory: "_StepMemory", place: int
    ) -> None:
        sequence, skipped = row.sequence, 8 * self._first
        assert sequence.slot_mapping is not None
        native.places = sequence.slot_mapping.address
        native.num_computed = sequence.num_computed.buffer_info()[0] + skipped
        native.num_own = sequence.num_own_computed.buffer_info()[0] + skipped
        native.thresholds = row.thresholds.buffer_info()[0] + skipped
        native.tokens, native.num_new = memory.tokens_of(place)
        native.num_arrived, native.slot = sequence.num_arrived(first), sequence.slot
        native.last_segment, native.num_asked = row.last_segment - self._first, row.num_asked
        native.is_active, native.rides, native.most_drafts = is_active, row.rides, row.most_drafts
        native.ends, native.num_ends = memory.ends_of(place)
        native.num_exit_answers = native.num_drafted = 0
        native.exit_answers, native.top = memory.exit_answers_of(place), memory.top_of(place)
        native.logits = memory.logits_of(place)

    def _output(self, row: RowPlan, native: calls.StepRow, memory: "_StepMemory", place: int) -> RowOutput:
        num_drafted, segment, num_asked = native.num_drafted, native.segment, native.num_exit_answers
        row.sequence.num_scheduled += num_drafted
        asked = memory.read_exit_answers(place, num_asked, self._first) if num_asked else []
        if segment < 0:
            return RowOutput(asked=asked)
        number = self._first + segment
        count = row.num_asked + num_drafted if number == row.last_segment else 1
        return RowOutput(number, memory.read_answers(place, count), asked)

    def _sample(self, rows: list[RowPlan], outputs: list[RowOutput], memory: "_StepMemory") -> None:
        """Chooses the tokens of rows whose choice needs more than the likeliest one."""
        requests, places = list[SampleRequest](), list[tuple[RowOutput, int]]()
        for place, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            if not memory.logits_of(place) or not output.answers:
                continue
            head, count = self._stage.heads[output.segment], len(output.answers)
            assert head.native is not None
            for i, scores in enumerate(
                token_logits(memory.read_logits(place, count, head.native.num_rows), head.vocab)
            ):
                length = len(row.sequence.tokens) + 1 - count + i
                requests.append(SampleRequest(row.sequence, length, output.answers[i].confidence, scores))
                places.append((output, i))
        for (output, i), answer in zip(places, self._stage.sampler.sample(requests), strict=True):
            output.answers[i] = answer

    def _segments_to(self, last: int, own: frozenset[int]) -> tuple["ctypes.Array[calls.Segment]", calls.Shape]:
        """Returns the segments of this stage up to segment `last`, with the own layers of the heads behind segments
        `own`. Layers that no row needs get no caches.
        """
        stop = min(last, self._numbers[-1]) + 1
        if (stop, own) not in self._segments:
            stage, numbers = self._stage, range(self._first, stop)
            run = stage.layers_of(self._first, stop - 1)
            assert run.native is not None
            made, first = (calls.Segment * len(numbers))(), 0
            for segment, number in zip(made, numbers, strict=True):
                cut = stage.segments[number]
                segment.num_layers = cut.last_layer + 1 - cut.first_layer
                segment.layers = ctypes.pointer(run.native[first]) if segment.num_layers else None
                first += segment.num_layers
                segment.is_read = cut.is_read
                if number in self._whole:
                    self._fill_head(segment, number, number in own)
            self._segments[stop, own] = made
            self._shape = run.shape
        return self._segments[stop, own], self._shape

    def _fill_head(self, segment: calls.Segment, number: int, has_own_layer: bool) -> None:
        head = self._stage.heads[number]
        assert head.native is not None
        segment.head.contents = head.native
        segment.takes_mlp_input = isinstance(head, DecodeExitHead) and head.head.takes_mlp_input
        if has_own_layer:
            own = self._stage.own_layer_of(number).native
            assert own is not None
            segment.own = own


class _StepMemory:
    """Memory that the kernels read and write for the rows of a step: one array of each kind for all rows."""

    def __init__(
        self, rows: list[RowPlan], still_active: Set[RowPlan], num_segments: int, logits_shape: tuple[int, torch.dtype]
    ):
        """`logits_shape` is (rows of the widest head, number type)."""
        tokens, ends, num_answers = list[int](), list[int](), 0
        self._tokens_at, self._ends_at, self._answers_at = [0], [0], [0]
        self._width, self._sampled, num_drafting = logits_shape[0], list[bool](), 0
        self._drafting_at: list[int | None] = []
        self._drafting_size = 3 * num_segments
        for row in rows:
            sequence, is_active = row.sequence, row in still_active
            tokens += sequence.tokens[sequence.num_computed[0] : sequence.num_scheduled]
            ends += sequence.stop_ids if row.most_drafts else ()
            num_answers += max(row.num_asked + row.most_drafts, 1)
            self._tokens_at.append(len(tokens))
            self._ends_at.append(len(ends))
            self._answers_at.append(num_answers)
            self._sampled.append(is_active and row.num_asked > 0 and not row.is_plain_greedy)
            has_drafts = is_active and sequence.speculates
            self._drafting_at.append(num_drafting * self._drafting_size if has_drafts else None)
            num_drafting += row.most_drafts + 1 if has_drafts else 0
        self._tokens, self._ends = array("q", tokens), array("q", ends)
        self._top = array("d", bytes(16 * num_answers))
        self._exit_answers = array("d", bytes(8 * num_drafting * self._drafting_size))
        self._addresses = [x.buffer_info()[0] for x in (self._tokens, self._ends, self._top, self._exit_answers)]
        self.logits: Tensor | None = None
        """[answers of all rows, rows of the widest head], flat; None where every row takes the likeliest token."""
        if any(self._sampled):
            self.logits = torch.empty(num_answers * self._width, dtype=logits_shape[1])

    def tokens_of(self, place: int) -> tuple[int, int]:
        """Returns (address, number) of a row's new tokens."""
        first, stop = self._tokens_at[place : place + 2]
        return self._addresses[0] + 8 * first, stop - first

    def ends_of(self, place: int) -> tuple[int, int]:
        """Returns (address, number) of the tokens behind which a row drafts nothing."""
        first, stop = self._ends_at[place : place + 2]
        return self._addresses[1] + 8 * first, stop - first

    def top_of(self, place: int) -> int:
        """Returns the address of a row's answers."""
        return self._addresses[2] + 16 * self._answers_at[place]

    def exit_answers_of(self, place: int) -> int | None:
        """Returns the address of the exits' answers; None for a row that does not speculate."""
        at = self._drafting_at[place]
        return None if at is None else self._addresses[3] + 8 * at

    def logits_of(self, place: int) -> int | None:
        """Returns the address of a row's logits; None where it takes the likeliest token."""
        if self.logits is None or not self._sampled[place]:
            return None
        return self.logits.data_ptr() + self._answers_at[place] * self._width * self.logits.itemsize

    def read_answers(self, place: int, count: int) -> list[Answer]:
        """Returns the first `count` answers of a row."""
        first, top = 2 * self._answers_at[place], self._top
        return [Answer(top[at + 1], int(top[at])) for at in range(first, first + 2 * count, 2)]

    def read_exit_answers(self, place: int, count: int, first_segment: int) -> list[ExitAnswer]:
        """Returns the first `count` answers of exits about a row's tokens."""
        first, values = self._drafting_at[place], self._exit_answers
        assert first is not None
        return [
            ExitAnswer(first_segment + int(values[at]), int(values[at + 1]), values[at + 2])
            for at in range(first, first + 3 * count, 3)
        ]

    def read_logits(self, place: int, count: int, width: int) -> Tensor:  # [count, width]
        """Returns the logits of a row's answers, by a head of `width` rows."""
        assert self.logits is not None
        first = self._answers_at[place] * self._width
        return self.logits[first : first + count * width].view(count, width)
