"""Drafts of a lone sequence, one after the other in one call: a draft costs so little that what lies between two of them would cost more.

The kernel goes through the shallowest exit that is asked as `Engine` does token by token, and ends where anything else has to be decided.
"""
from array import array
from dataclasses import dataclass

import torch

from ee_tuning.generation.judge import Answer
from ee_tuning.generation.processors import takes_likeliest
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.speculation import EDGES, Speculation
from ee_tuning.kernel import calls
from ee_tuning.model.exit_head import AdapterHead

# h hidden


@dataclass(frozen=True)
class DraftRun:
    """What an exit said of a sequence's newest token and of its drafts, in order."""

    exit_layer: int
    answers: list[Answer]
    num_drafted: int
    """All, or all but the last one."""
    seconds_in_head: float


class Drafter:
    """Runs drafts on the one rank of a model that is not cut."""

    def __init__(self, runner: Runner):
        self.runner, self.pieces = runner, runner.pieces
        self.is_able = runner.topology.num_in_replica == 1 and runner.words is not None and all(
            layer.is_native for layer in runner.layers.values())
        self._edges = array("d", EDGES)

    def run(self, sequence: Sequence, index: int, sure: float, room: int, speculation: Speculation) -> DraftRun | None:
        """Drafts up to `room` tokens at the exit behind piece `index`; None where only single steps will do.

        The newest token of the sequence, the only one running, is at the entrance; `sure` is how confident it has to be.
        """
        if not self._serves(sequence, index):
            return None
        layer = self.pieces[index].last_layer
        position, waiting = sequence.num_fed - 1, sequence.head_states.get(layer, [])
        assert sequence.places is not None and self.runner.words is not None
        most = min(room, len(sequence.places.index) - position)
        states = torch.empty(most, self.runner.config.hidden_size, dtype=self.runner.model.plan.dtype)
        late = torch.cat(waiting) if waiting else states[:0]
        tokens, confidence = array("q", bytes(8 * most)), array("d", bytes(8 * most))
        drafts = calls.Drafts(
            sequence.tokens[-1], position, most, torch.get_num_threads(), len(late),
            self.runner.exit_heads[layer].head.takes_mlp_input, sure, sequence.drafts.odds, sequence.places.address,
            *(table.data_ptr() for table in self.runner.tables), self.runner.words.data_ptr(), late.data_ptr(),
            tokens=_address(tokens), confidence=_address(confidence))
        self._call(sequence, index, drafts, states, speculation)
        self._move_on(sequence, index, states[:drafts.num_asked])
        answers = [Answer(confidence[i], tokens[i], None, None) for i in range(drafts.num_asked)]
        return DraftRun(layer, answers, drafts.num_drafted, drafts.seconds_in_head)

    def _serves(self, sequence: Sequence, index: int) -> bool:
        """Whether the kernels compute this exit, and the sequence wants nothing that they do not know."""
        layer = self.pieces[index].last_layer
        return (self.is_able and self.runner.exit_heads[layer].native is not None
                and not isinstance(self.runner.exit_heads[layer].head, AdapterHead)
                and takes_likeliest(sequence, len(sequence.tokens))
                and not any(sequence.num_pending(i) for i in range(1, index + 1))
                and all(other == layer or other > self.pieces[index].last_layer for other in sequence.head_watermarks)
                and sequence.watermarks[index] - sequence.head_watermarks.get(layer, sequence.watermarks[index]) < calls.MOST_TOKENS)

    def _call(self, sequence: Sequence, index: int, drafts: calls.Drafts, states: torch.Tensor, speculation: Speculation) -> None:
        layer, run = self.pieces[index].last_layer, self.runner.layers_of(0, index)
        record = speculation.records[layer]
        odds, ends = array("d", (record.odds(place) for place in range(len(EDGES)))), array("q", sequence.stop_ids)
        rule = calls.DraftRule(sequence.drafts.plan[layer], speculation.worth(sequence, layer, 1), _address(self._edges), _address(odds),
                               len(EDGES), _address(ends), len(ends))
        own = self.runner.head_layers.layer_of(layer).native if layer in self.runner.head_layers.own else None
        head = self.runner.exit_heads[layer].native
        assert run.native is not None and head is not None
        calls.run_drafts(run.shape, run.native, own, head, rule, drafts, states)

    def _move_on(self, sequence: Sequence, index: int, states: torch.Tensor) -> None:  # [asked, h]
        sequence.num_fed += len(states) - 1
        sequence.watermarks[:index + 1] = [sequence.num_fed] * (index + 1)
        sequence.boundary[index + 1].append(states)
        layer = self.pieces[index].last_layer
        if layer in sequence.head_watermarks:
            sequence.head_watermarks[layer], sequence.head_states[layer] = sequence.num_fed, []


def _address(numbers: "array[int] | array[float]") -> int | None:
    return numbers.buffer_info()[0] if numbers else None
