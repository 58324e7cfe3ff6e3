"""The way of a policy's tokens through the network: the segments of each stage, and the heads behind them."""

import ctypes
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ee_tuning.generation.policy import Policy
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.kernel import calls
from ee_tuning.model.ragged_head import RaggedExitHead

MOST_TOKENS = 4 * calls.MOST_TOKENS
"""The most tokens of a step, those that ride along included."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The segments of one stage. Each begins at a piece of `starts` and ends with the one in the same place of
    `ends`.
    """

    stage: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    is_asked: tuple[bool, ...]
    """Whether a head behind the segment is."""

    @property
    def decides(self) -> bool:
        """Whether a token may leave here."""
        return any(self.is_asked)


class Route:
    """The route of a policy whose tokens go through the pieces up to `last_piece`."""

    def __init__(self, runner: Runner, policy: Policy, last_piece: int):
        self.policy, self.last_piece, self._runner = policy, last_piece, runner
        pieces = runner.pieces
        asked = [i for i in range(last_piece) if pieces[i].last_layer in policy.thresholds]
        self.heads: dict[int, int | None] = {**{i: pieces[i].last_layer for i in asked}, last_piece: policy.fixed_exit}
        """Piece -> the head that is asked behind it; None is the model's own."""
        self.thresholds = {**{i: policy.thresholds[pieces[i].last_layer] for i in asked}, last_piece: 0.0}
        self.parts = tuple(
            self._part(stage, list(indices))
            for stage, indices in groupby(range(last_piece + 1), lambda i: pieces[i].stage)
        )
        self._inner_starts = [start for part in self.parts for start in part.starts if start]
        self.num_busy_stages = sum(
            any(pieces[i].last_layer >= pieces[i].first_layer for i in range(part.starts[0], part.ends[-1] + 1))
            for part in self.parts
        )
        """Stages with layers that tokens go through."""
        own = [part for part in self.parts if part.stage == runner.topology.stage]
        self.segments = self._segments(own[0]) if own and self._is_native(own[0]) else None
        """The segments of this stage, where the kernels serve."""
        is_simple = policy.measure == "max_probability" and runner.head_layers.own.isdisjoint(self.heads.values())
        # In one process, going through segments one by one is what the walk through pieces does.
        self.serves = is_simple and (runner.topology.pp > 1 or self.segments is not None)
        """Whether steps can be had so. The same on every rank."""

    def _is_native(self, part: Part) -> bool:
        return self._runner.is_native and all(
            self._runner.heads[self.heads[end]].is_whole for end in part.ends if end in self.heads
        )

    def _part(self, stage: int, indices: list[int]) -> Part:
        ends = [i for i in indices if i in self.heads or i == indices[-1]]
        return Part(
            stage=stage,
            starts=(indices[0], *(end + 1 for end in ends[:-1])),
            ends=tuple(ends),
            is_asked=tuple(end in self.heads for end in ends),
        )

    def _segments(self, part: Part) -> "ctypes.Array[calls.Segment]":
        runs = [self._runner.layers_of(start, end) for start, end in zip(part.starts, part.ends, strict=True)]
        self.shape, segments = runs[0].shape, (calls.Segment * len(runs))()
        for segment, end, run in zip(segments, part.ends, runs, strict=True):
            assert run.native is not None
            segment.layers, segment.num_layers = run.native, len(run.native)
            if end in self.heads:
                head = self._runner.heads[self.heads[end]]
                assert head.native is not None
                segment.head.contents = head.native
                segment.takes_mlp_input = isinstance(head, RaggedExitHead) and head.head.takes_mlp_input
                segment.threshold = self.thresholds[end]
        return segments

    def fits(self, rows: list[Sequence]) -> bool:
        """Whether all that waits of `rows` waits where a segment begins, and is no more than the kernels take."""
        if len(rows) > calls.MOST_TOKENS and self._runner.topology.device.type == "cpu":
            return False
        total = len(rows)
        for sequence in rows:
            marks = sequence.watermarks
            if marks[0] != sequence.num_fed - 1:
                return False
            if num_waiting := marks[0] - marks[self.last_piece]:
                if num_waiting != sum([marks[start - 1] - marks[start] for start in self._inner_starts]):
                    return False
                total += num_waiting
        return total <= MOST_TOKENS or self._runner.topology.device.type != "cpu"


def waiting_within(part: Part, rows: list[Sequence]) -> tuple["ctypes.Array[calls.Waiting]", int, list[Tensor]]:
    """What waits in front of a part's segments but the first, on the stage that has them: table, number of tokens, and
    the tensors that it lies in.
    """
    table, kept, total = (calls.Waiting * (len(part.starts) * len(rows)))(), list[Tensor](), 0
    if all([s.watermarks[part.starts[0]] == s.watermarks[part.ends[-1]] for s in rows]):
        return table, 0, kept
    for number, start in enumerate(part.starts[1:], 1):
        for r, sequence in enumerate(rows):
            count = sequence.watermarks[start - 1] - sequence.watermarks[start]
            if count > 0:
                states = sequence.boundary[start]
                kept.append(states[0] if len(states) == 1 else torch.cat(states))
                table[number * len(rows) + r] = calls.Waiting(kept[-1].data_ptr(), count)
                total += count
    return table, total, kept
