"""A stage's part of a step in one call of the CPU kernels (`kernel/step.h`): what lies between two segments in Python
would cost more than a shallow one.
"""

import ctypes
from array import array

import torch
from torch import Tensor

from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.engine.sampler import SampleRequest
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, ExitAnswer, RowOutput, RowPlan
from ee_tuning.kernel import calls
from ee_tuning.parallel.shortlist import token_logits

# q states that a head is asked about · v vocabulary

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

    def serves(self, rows: list[RowPlan], active: list[RowPlan], numbers: range) -> bool:
        """Whether the kernels have all that these rows ask for, and they are no more than the kernels are good for."""
        if len(rows) > calls.MOST_TOKENS or (self._embedding is None and numbers[0] == 0):
            return False
        if any([row.is_read for row in rows]):
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
        if row.sequence.policy.measure != "max_probability":
            return False
        stop = min(numbers[-1], row.last_segment) + 1
        return all([n in self._whole for n in range(numbers[0], stop) if row.is_asked(n) and n in self._stage.heads])

    def run(self, rows: list[RowPlan], active: list[RowPlan], numbers: range, fills: bool) -> list[RowOutput]:
        """See `ModelRunner.run`: states come from the boundary ring, and go there."""
        stage, going = self._stage, {*active}
        own = frozenset(number for row in rows for number in row.sequence.own_layers)
        segments, shape = self._segments_to(max(row.last_segment for row in rows), own)
        buffers = [_RowBuffers(row, row in going, len(numbers), self._logits_shape) for row in rows]
        native_rows = (calls.StepRow * len(rows))(
            *[self._row(row, row in going, numbers[0], buffer) for row, buffer in zip(rows, buffers, strict=True)]
        )
        embeds = numbers[0] == 0 and self._embedding is not None
        step = calls.Step(
            torch.get_num_threads(),
            len(rows),
            len(segments),
            numbers[0] - self._first,
            fills,
            native_rows,
            segments,
            ctypes.addressof(self._rings),
            stage.ring.capacity,
            *(table.data_ptr() for table in stage.tables),
            self._embedding.data_ptr() if embeds and self._embedding is not None else None,
        )
        calls.run_step(shape, step, stage.model.plan.dtype)
        stage.seconds_in_heads += step.seconds_in_heads
        outputs = [self._output(row, each, b) for row, each, b in zip(rows, native_rows, buffers, strict=True)]
        for row, each in zip(rows, native_rows, strict=True):
            row.sequence.num_scheduled += each.num_drafted
        self._sample(rows, outputs, buffers)
        return outputs

    def _row(self, row: RowPlan, is_active: bool, first: int, buffers: "_RowBuffers") -> calls.StepRow:
        sequence, skipped = row.sequence, 8 * self._first
        assert sequence.slot_mapping is not None
        return calls.StepRow(
            sequence.slot_mapping.address,
            sequence.num_computed.buffer_info()[0] + skipped,
            sequence.num_own_computed.buffer_info()[0] + skipped,
            row.thresholds.buffer_info()[0] + skipped,
            buffers.tokens.buffer_info()[0],
            len(buffers.tokens),
            sequence.num_arrived(first),
            sequence.slot,
            row.last_segment - self._first,
            row.num_asked,
            is_active,
            row.rides,
            row.most_drafts,
            buffers.ends.buffer_info()[0] if buffers.ends else None,
            len(buffers.ends),
            -1,
            0,
            buffers.exit_answers.buffer_info()[0] if buffers.exit_answers else None,
            buffers.top.buffer_info()[0],
            None if buffers.logits is None else buffers.logits.data_ptr(),
            0,
        )

    def _output(self, row: RowPlan, native: calls.StepRow, buffers: "_RowBuffers") -> RowOutput:
        if native.segment < 0 and not native.num_exit_answers:
            return RowOutput()
        values = buffers.exit_answers
        asked = [
            ExitAnswer(self._first + int(values[3 * i]), int(values[3 * i + 1]), values[3 * i + 2])
            for i in range(native.num_exit_answers)
        ]
        if native.segment < 0:
            return RowOutput(asked=asked)
        number, top = self._first + native.segment, buffers.top
        count = row.num_asked + native.num_drafted if number == row.last_segment else 1
        answers = [Answer(top[2 * i + 1], int(top[2 * i])) for i in range(count)]
        return RowOutput(number, answers, asked)

    def _sample(self, rows: list[RowPlan], outputs: list[RowOutput], buffers: list["_RowBuffers"]) -> None:
        """Chooses the tokens of rows that take more than the likeliest one."""
        requests, places = list[SampleRequest](), list[tuple[RowOutput, int]]()
        for row, output, own in zip(rows, outputs, buffers, strict=True):
            if own.logits is None or not output.answers:
                continue
            head, count = self._stage.heads[output.segment], len(output.answers)
            assert head.native is not None
            flat: Tensor = own.logits[: count * head.native.num_rows].view(count, -1)
            for i, scores in enumerate(token_logits(flat, head.vocab)):
                length = len(row.sequence.tokens) + 1 - count + i
                requests.append(SampleRequest(row.sequence, length, output.answers[i].confidence, scores))
                places.append((output, i))
        for (output, i), answer in zip(places, self._stage.sampler.sample(requests), strict=True):
            output.answers[i] = answer

    def _segments_to(self, last: int, own: frozenset[int]) -> tuple["ctypes.Array[calls.Segment]", calls.Shape]:
        """The segments of this stage up to segment `last`, with the layers that heads behind segments `own` have of
        their own. Layers that no row needs get no caches.
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


class _RowBuffers:
    """Memory that the kernels read and write for a row, alive during a call."""

    def __init__(self, row: RowPlan, is_active: bool, num_segments: int, logits_shape: tuple[int, torch.dtype]):
        """`logits_shape` is (rows of the widest head, number type)."""
        sequence, most = row.sequence, row.num_asked + row.most_drafts
        self.tokens = array("q", sequence.tokens[sequence.num_computed[0] : sequence.num_scheduled])
        self.ends = array("q", sequence.stop_ids if row.most_drafts else ())
        self.top = array("d", bytes(16 * max(most, 1)))
        has_drafts = is_active and sequence.speculates
        self.exit_answers = array("d", bytes(24 * num_segments * (row.most_drafts + 1) if has_drafts else 0))
        self.logits: Tensor | None = None
        if is_active and row.num_asked and not row.is_plain_greedy:
            width, dtype = logits_shape
            self.logits = torch.empty(most * width, dtype=dtype)
