"""A step of a sequence that decodes alone, in one call of the kernels: what lies between two segments would cost more than a shallow one.

It does what `Engine` does piece by piece, for requests that take the likeliest token.
"""
import torch

from ee_tuning.generation.judge import Answer
from ee_tuning.generation.policy import Policy
from ee_tuning.generation.processors import takes_likeliest
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.kernel import calls
from ee_tuning.model.exit_head import AdapterHead
from ee_tuning.model.ragged_head import RaggedExitHead, RaggedHead

# h hidden


class LoneStepper:
    """Takes steps on the one rank of a model that is not cut."""

    def __init__(self, runner: Runner):
        self.runner, self.pieces = runner, runner.pieces
        self.is_able = runner.topology.num_in_replica == 1 and runner.words is not None and all(
            layer.is_native for layer in runner.layers.values())
        self.seconds_in_heads = 0.0
        self._newest: _Route | None = None

    def take(self, sequence: Sequence) -> tuple[Answer, int] | None:
        """The next token of the only sequence that runs, its newest one at the entrance, and the layer that it left at; None where the
        pieces have to be gone through one by one.
        """
        if not self.is_able or not sequence.num_output or not takes_likeliest(sequence, len(sequence.tokens)):
            return None
        route = self._newest
        if route is None or route.policy is not sequence.policy or route.last_piece != sequence.last_piece:
            route = self._newest = _Route(self.runner, sequence.policy, sequence.last_piece)
        if not route.serves or not route.load(sequence):
            return None
        assert sequence.places is not None and self.runner.words is not None
        states = torch.empty(calls.MOST_TOKENS, self.runner.config.hidden_size, dtype=self.runner.words.dtype)
        step = calls.Step(sequence.tokens[-1], sequence.num_fed - 1, torch.get_num_threads(), sequence.places.address,
                          *(table.data_ptr() for table in self.runner.tables), self.runner.words.data_ptr())
        calls.run_step(route.shape, route.segments, step, states)
        self.seconds_in_heads += step.seconds_in_heads
        index = route.ends[step.segment]
        self._move_on(sequence, index, states[:step.num_carried])
        return Answer(step.top[1], int(step.top[0]), None, None), self.pieces[index].last_layer

    def _move_on(self, sequence: Sequence, index: int, states: torch.Tensor) -> None:  # [waiting behind the piece, h]
        for piece in range(index + 1):
            sequence.statistics.num_catch_up += sequence.num_fed - 1 - sequence.watermarks[piece]
            sequence.watermarks[piece] = sequence.num_fed
            sequence.boundary[piece].clear()
        if index < sequence.last_piece:
            sequence.boundary[index + 1].append(states)


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
        self.serves = policy.measure == "max_probability" and all(_is_known(head) for head in heads)
        if not self.serves:
            return
        runs = [runner.layers_of(start, end) for start, end in zip(self.starts, self.ends, strict=True)]
        self.shape, self.segments = runs[0].shape, (calls.Segment * len(runs))()
        self._kept = [(run.native, head.native) for run, head in zip(runs, heads, strict=True)]
        for segment, end, run, head in zip(self.segments, self.ends, runs, heads, strict=True):
            assert run.native is not None and head.native is not None
            segment.layers, segment.num_layers, segment.head.contents = run.native, len(run.native), head.native
            segment.takes_mlp_input = isinstance(head, RaggedExitHead) and head.head.takes_mlp_input
            segment.threshold = policy.thresholds.get(layers[end], 0.0)

    def load(self, sequence: Sequence) -> bool:
        """Tells the segments what waits in front of them; False where something waits elsewhere, or more than the kernels take."""
        counts = [sequence.num_pending(piece) for piece in range(self.last_piece + 1)]
        if counts[0] != 1 or sum(counts) > calls.MOST_TOKENS or sum(counts) > sum(counts[start] for start in self.starts):
            return False
        self._waiting = []
        for segment, start in zip(self.segments[1:], self.starts[1:], strict=True):
            segment.num_waiting = counts[start]
            if counts[start]:
                states = sequence.boundary[start]
                self._waiting.append(states[0] if len(states) == 1 else torch.cat(states))
                segment.waiting = self._waiting[-1].data_ptr()
        return True


def _is_known(head: RaggedHead) -> bool:
    """Whether the kernels compute all of it."""
    is_whole = not isinstance(head, RaggedExitHead) or not (head.layer or isinstance(head.head, AdapterHead))
    return head.native is not None and is_whole
