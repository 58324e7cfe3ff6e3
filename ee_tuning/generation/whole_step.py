"""A step of sequences that decode side by side, in one call of the kernels: what lies between two segments would cost more than a shallow
one.

It does what `Engine` does piece by piece, where all of them decode by one policy and take the likeliest token.
"""
import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.generation.judge import Answer
from ee_tuning.generation.policy import Policy
from ee_tuning.generation.processors import takes_likeliest
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.kernel import calls
from ee_tuning.model.ragged_head import RaggedExitHead

# h hidden

MOST_TOKENS = 4 * calls.MOST_TOKENS
"""Of a step, those that ride along included."""


class Left(NamedTuple):
    """The next token of a sequence, and the layer that its newest one left at."""

    sequence: Sequence
    answer: Answer
    layer: int


class WholeSteps:
    """Takes steps on the one rank of a model that is not cut."""

    def __init__(self, runner: Runner):
        self.runner, self.pieces = runner, runner.pieces
        self.is_able = runner.is_native
        self.seconds_in_heads = 0.0
        self._newest: _Route | None = None

    def take(self, rows: list[Sequence]) -> list[Left] | None:
        """A step of all sequences that run, their newest tokens at the entrance, in the order that they leave; None where the pieces have
        to be gone through one by one.
        """
        first = rows[0]
        if not self.is_able or len(rows) > calls.MOST_TOKENS or not all([_is_known(s, first.policy) for s in rows]):
            return None
        route = self._newest
        if route is None or route.policy is not first.policy:
            route = self._newest = _Route(self.runner, first.policy, first.last_piece)
        waiting = route.waiting(rows) if route.serves else None
        if waiting is None:
            return None
        assert self.runner.words is not None
        table, total, _kept = waiting
        states = torch.empty(total, self.runner.config.hidden_size, dtype=self.runner.words.dtype)
        told = (calls.StepRow * len(rows))(*[calls.StepRow(s.tokens[-1], s.num_fed - 1, s.places.address) for s in rows if s.places])
        step = calls.Step(torch.get_num_threads(), len(rows), len(route.segments), told, table,
                          *(each.data_ptr() for each in self.runner.tables), self.runner.words.data_ptr())
        calls.run_step(route.shape, route.segments, step, states)
        self.seconds_in_heads += step.seconds_in_heads
        places = [route.ends[row.segment] for row in told]
        self._move_on(rows, places, [row.num_carried for row in told], route.ends[step.num_run - 1], states)
        left = [Left(s, Answer(row.top[1], int(row.top[0]), None, None), self.pieces[place].last_layer)
                for s, row, place in zip(rows, told, places, strict=True)]
        return sorted(left, key=lambda each: each.layer)

    def _move_on(self, rows: list[Sequence], places: list[int], counts: list[int], index: int, states: Tensor) -> None:  # [Σ counts, h]
        """Books a step that went as far as piece `index`, behind which the states of `counts` tokens wait; rows left behind `places`."""
        first = 0
        for sequence, place, count in zip(rows, places, counts, strict=True):
            marks = sequence.watermarks
            sequence.statistics.num_catch_up += (sequence.num_fed - 1) * (index + 1) - sum(marks[:index + 1]) + index - place
            marks[:index + 1] = [sequence.num_fed] * (index + 1)
            for piece in range(index + 1):
                sequence.boundary[piece].clear()
            if index < sequence.last_piece:
                sequence.boundary[index + 1].append(states[first: first + count])
            first += count


class _Route:
    """The segments that a policy's tokens go through, as the kernels take them. Each begins at a piece of `starts` and ends with the one in
    the same place of `ends`, and a head behind it.
    """

    def __init__(self, runner: Runner, policy: Policy, last_piece: int):
        self.policy, self.last_piece = policy, last_piece
        layers = [piece.last_layer for piece in runner.pieces]
        self.ends = [*(i for i in range(last_piece) if layers[i] in policy.thresholds), last_piece]
        self.starts = [0, *(end + 1 for end in self.ends[:-1])]
        heads = [*(runner.heads[layers[end]] for end in self.ends[:-1]), runner.heads[policy.fixed_exit]]
        self.serves = policy.measure == "max_probability" and all(head.is_whole and head.layer is None for head in heads)
        if not self.serves:
            return
        runs = [runner.layers_of(start, end) for start, end in zip(self.starts, self.ends, strict=True)]
        self.shape, self.segments = runs[0].shape, (calls.Segment * len(runs))()
        for segment, end, run, head in zip(self.segments, self.ends, runs, heads, strict=True):
            assert run.native is not None and head.native is not None
            segment.layers, segment.num_layers, segment.head.contents = run.native, len(run.native), head.native
            segment.takes_mlp_input = isinstance(head, RaggedExitHead) and head.head.takes_mlp_input
            segment.threshold = policy.thresholds.get(layers[end], 0.0)

    def waiting(self, rows: list[Sequence]) -> "tuple[ctypes.Array[calls.Waiting], int, list[Tensor]] | None":
        """What waits in front of the segments, how many tokens a step has with it, and the tensors that it lies in; None where something
        waits elsewhere, or more than the kernels take.
        """
        table, kept, total = (calls.Waiting * (len(self.starts) * len(rows)))(), [], len(rows)
        for r, sequence in enumerate(rows):
            marks = sequence.watermarks
            total += marks[0] - marks[self.last_piece]
            found = 0
            for number, start in enumerate(self.starts[1:], 1):
                if (count := marks[start - 1] - marks[start]) > 0:
                    states = sequence.boundary[start]
                    kept.append(states[0] if len(states) == 1 else torch.cat(states))
                    table[number * len(rows) + r] = calls.Waiting(kept[-1].data_ptr(), count)
                    found += count
            if found != marks[0] - marks[self.last_piece] or marks[0] != sequence.num_fed - 1:
                return None
        return (table, total, kept) if total <= MOST_TOKENS else None


def _is_known(sequence: Sequence, policy: Policy) -> bool:
    """Whether the kernels know all that a sequence wants of its next token."""
    is_same = sequence.policy is policy or sequence.policy == policy
    return (is_same and not policy.drafts_at and sequence.has_all_fed and sequence.num_output > 0
            and takes_likeliest(sequence, len(sequence.tokens)))
