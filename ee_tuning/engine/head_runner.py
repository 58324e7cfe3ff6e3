"""Evaluates the heads of a stage on the rows of a pass, and runs the heads' own layers.

The layer of a `layer` head needs the keys and values of all earlier tokens. They are computed when the head is asked,
as one causal block, and only for requests whose policy may ask it: a head that no request asks costs nothing.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.decoding.decode_head import DecodeExitHead, DecodeHead
from ee_tuning.engine.boundary_ring import PassStates
from ee_tuning.engine.sampler import SampleRequest
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.engine.step_plan import Answer, ExitAnswer, RowOutput, RowPlan
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.shortlist import token_confidences, token_logits
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.vocab import at_least_float32
from ee_tuning.sampling.exit_fusion import fused_logits

# h hidden · q states that a head is evaluated on


class ToSample(NamedTuple):
    """An answer that needs the sampler."""

    output: RowOutput
    request: SampleRequest


class HeadRunner:
    """The heads of one stage."""

    def __init__(self, stage: StageModel):
        self.stage = stage

    @part("heads")
    def ask(
        self,
        number: int,
        asked: list[RowPlan],
        states: PassStates,
        exit_input: ExitInput,
        outputs: dict[RowPlan, RowOutput],
    ) -> list[ToSample]:
        """Evaluates the head behind segment `number` on the newest tokens of rows, and lets rows leave where its
        confidence suffices. Returns the answers that are still to be sampled, in the order of the rows.
        """
        with self._timed():
            head = self.stage.heads[number]
            counts = [row.num_asked if number == row.last_segment else 1 for row in asked]
            logits, top = head.ask(self._input(number, asked, counts, states, exit_input))
            found = _confidences(head, asked, counts, logits, top).tolist()
            places, requests, first = list[int](), list[ToSample](), 0
            for row, count in zip(asked, counts, strict=True):
                own, output = found[first : first + count], outputs[row]
                is_last = number == row.last_segment
                if row.sequence.speculates and not is_last:
                    output.asked.append(ExitAnswer(number, int(own[0][0]), own[0][1]))
                if is_last or own[0][1] >= row.thresholds[number]:
                    output.segment = number
                    if row.is_plain_greedy:
                        output.answers = [Answer(confidence, int(token)) for token, confidence in own]
                    else:
                        places += range(first, first + count)
                        requests += _requests(row, output, [confidence for _, confidence in own])
                first += count
            if not places:
                return []
            scores = token_logits(logits[places], head.vocab).cpu()  # a collective: the same rows on every rank
            return [
                ToSample(each.output, each.request._replace(logits=_with_exits(each.request, number, row)))
                for each, row in zip(requests, scores, strict=True)
            ]

    def keep_fused_logits(self, number: int, rows: list[RowPlan], states: PassStates, exit_input: ExitInput) -> None:
        """Keeps the logits of the exit behind segment `number` for tokens of `rows` that the final head will be asked
        about, now or (drafts) later.
        """
        if not rows:
            return
        with self._timed():
            lengths = {s.number: length for s, length in zip(states.rows, states.lengths, strict=True)}
            counts = [min(row.num_asked, lengths[row.sequence.number]) for row in rows]
            head = self.stage.heads[number]
            logits, _ = head.ask(self._input(number, rows, counts, states, exit_input))
            said = at_least_float32(token_logits(logits, head.vocab)).cpu().split(counts)
            for row, own in zip(rows, said, strict=True):
                row.sequence.keep_fused_logits(number, row.sequence.num_computed[number], own.clone())

    def num_fused(self, rows: list[RowPlan], stage: int) -> int:
        """Returns the number of logits [v] of exits on earlier stages that `stage` gets for `rows`."""
        return sum(len(self._fused_keys(row, stage)) for row in rows)

    def fused_message(self, rows: list[RowPlan], stage: int) -> Tensor:  # [num_fused, v]
        """Returns these logits, on the stage before. Those of a row that has left are arbitrary and never read."""
        none = torch.zeros(self.stage.model.vocab.size, dtype=self.fused_dtype)
        said = [row.sequence.fused_logits.get(key, none) for row in rows for key in self._fused_keys(row, stage)]
        return torch.stack(said).to(self.stage.topology.device)

    def take_fused(self, rows: list[RowPlan], stage: int, message: Tensor) -> None:  # [num_fused, v]
        """Keeps the logits that the stage before has sent."""
        said = iter(message.cpu())
        for row in rows:
            for segment, place in self._fused_keys(row, stage):
                row.sequence.keep_fused_logits(segment, place + 1, next(said)[None])

    @property
    def fused_dtype(self) -> torch.dtype:
        """The dtype of kept logits."""
        return torch.promote_types(self.stage.model.plan.dtype, torch.float32)

    def _fused_keys(self, row: RowPlan, stage: int) -> list[tuple[int, int]]:
        """Returns the segments of stages before `stage`, and the places of the tokens that the final head is asked
        about.
        """
        stop = row.sequence.num_scheduled
        return [
            (segment, place)
            for segment in row.sequence.fused_segments
            if self.stage.segments[segment].stage < stage
            for place in range(stop - row.num_asked, stop)
        ]

    def sample(self, answers: list[ToSample]) -> None:
        """Chooses the tokens of all rows of a step whose choice needs more than the likeliest one."""
        chosen = self.stage.sampler.sample([each.request for each in answers])
        for each, answer in zip(answers, chosen, strict=True):
            each.output.answers.append(answer)

    def keep(self, number: int, states: PassStates, asked: list[RowPlan]) -> None:
        """Keeps states of tokens for the own layer of the head behind segment `number`, which was not asked about
        them.
        """
        if number in self.stage.own_layers:
            answered = [row.sequence for row in asked]
            kept = [s for s in states.rows if s.keeps_own(number) and s not in answered]
            self._bound(number, kept, states)
            self.stage.ring.write(number + 1, states, kept)

    def bound_all(self, numbers: range, rows: list[Sequence]) -> None:
        """Runs the heads' own layers over tokens that they lack, where too many are pending in the boundary ring."""
        for number in self.stage.own_layers.intersection(numbers):
            self._bound(number, [s for s in rows if s.keeps_own(number)], None)

    def follow(self, number: int, rows: list[Sequence], asked: list[Sequence]) -> None:
        """Counts the tokens that a head's own layer computed on another stage, as `ask` and `keep` did there."""
        for sequence in [s for s in rows if s.keeps_own(number)]:
            if sequence in asked:
                sequence.num_own_computed[number] = sequence.num_computed[number]
            elif self._is_late(sequence, number):
                sequence.num_own_computed[number] = sequence.num_computed[number] - 1

    def _bound(self, number: int, rows: list[Sequence], states: PassStates | None) -> None:
        # The newest token may still be asked about.
        if late := [s for s in rows if self._is_late(s, number)]:
            self._run_own(number, late, num_left=1, states=states)

    def _is_late(self, sequence: Sequence, number: int) -> bool:
        # A prompt's tokens are computed at once, so that other requests can share them.
        most = 1 if sequence.num_scheduled <= sequence.num_to_prefill else self.stage.max_pending
        return sequence.num_computed[number] - sequence.num_own_computed[number] > most

    def _input(
        self, number: int, asked: list[RowPlan], counts: list[int], states: PassStates, exit_input: ExitInput
    ) -> ExitInput:  # [q, h]
        """Returns the input of the head behind segment `number` for the newest `counts` tokens of each row."""
        if number in self.stage.own_layers:
            return self._run_own(number, [row.sequence for row in asked], num_left=0, states=states)
        head, hidden = self.stage.heads[number], states.hidden
        inputs = head.take(hidden, exit_input) if isinstance(head, DecodeExitHead) else ExitInput(hidden)
        stops = dict(zip((s.number for s in states.rows), itertools.accumulate(states.lengths), strict=True))
        ends = [stops[row.sequence.number] for row in asked]
        places = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
        return inputs if places == list(range(hidden.shape[0])) else inputs.rows(places)

    def _run_own(
        self, number: int, rows: list[Sequence], *, num_left: int, states: PassStates | None
    ) -> ExitInput:  # [rows, h]
        """Runs a head's own layer over all tokens that it lacks except for the newest `num_left`. Returns the last
        output.
        """
        starts = [s.num_own_computed[number] for s in rows]
        stops = [s.num_computed[number] - num_left for s in rows]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        hidden = self.stage.ring.read(number + 1, rows, starts, stops, states)
        for sequence, stop in zip(rows, stops, strict=True):
            sequence.num_own_computed[number] = stop
        batch = self.stage.describe(rows, starts, lengths)
        made = ExitInput(hidden, layer_output=self.stage.own_layer_of(number)(hidden, batch)[0])
        return made if max(lengths) == 1 else made.rows([end - 1 for end in itertools.accumulate(lengths)])

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stage.seconds_in_heads += time.perf_counter() - began


def _confidences(
    head: DecodeHead, asked: list[RowPlan], counts: list[int], logits: Tensor, top: Tensor
) -> Tensor:  # [q, 2] float64
    """Returns the likeliest token of each state, and the confidence by the measure of its request."""
    first = 0
    for row, count in zip(asked, counts, strict=True):
        if (measure := row.sequence.policy.measure) != "max_probability":
            top[first : first + count, 1] = token_confidences(logits[first : first + count], head.vocab, measure)
        first += count
    return top


def _with_exits(request: SampleRequest, number: int, logits: Tensor) -> Tensor:  # [v] -> [v]
    """Returns the logits behind segment `number` that a token is chosen by: those of the final head, changed by the
    exits'.
    """
    sequence = request.sequence
    if not sequence.fused_segments or number != sequence.last_segment:
        return logits
    said = [sequence.fused_logits[segment, request.length - 1] for segment in sequence.fused_segments]
    return fused_logits(logits, torch.stack(said), sequence.params.fusion)


def _requests(row: RowPlan, output: RowOutput, confidences: list[float]) -> list[ToSample]:
    """Returns the requests of a row's states, without logits. The last one follows all its tokens."""
    first = len(row.sequence.tokens) + 1 - len(confidences)
    return [
        ToSample(output, SampleRequest(row.sequence, first + i, confidence)) for i, confidence in enumerate(confidences)
    ]
