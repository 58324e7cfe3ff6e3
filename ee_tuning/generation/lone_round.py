"""A round of speculation of a sequence that decodes alone, in one call of the kernels: drafts of one exit, and their
check.

It does what `Engine` does token by token, for requests that take the likeliest token and plans that ask one exit or
none.
"""

from array import array
from typing import NamedTuple

import torch

from ee_tuning.generation.judge import Answer
from ee_tuning.generation.processors import takes_likeliest
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.generation.speculation import EDGES, Speculation
from ee_tuning.kernel import calls

# h hidden


class LoneRound(NamedTuple):
    """What was said of a sequence's newest token and of the drafts behind it."""

    said: list[Answer]
    """The exit's answer for each token that was asked."""
    num_drafted: int
    """All of those, or all but the last one."""
    checked: list[Answer]
    """The full model's answers, after the newest token and after each draft."""
    seconds_in_heads: float


class LoneRounds:
    """Rounds on the one rank of a model that is not cut."""

    def __init__(self, runner: Runner):
        self.runner, self.pieces = runner, runner.pieces
        self.is_able = runner.is_native and runner.topology.num_in_replica == 1
        self._routes: dict[int, calls.Route] = {}
        self._edges = array("d", EDGES)

    def serves(self, sequence: Sequence, index: int) -> bool:
        """Whether a round that drafts behind piece `index` can be had in one call. The newest token has to be at the
        entrance.
        """
        if not self.is_able or index + 1 == len(self.pieces):
            return False
        layer = self.pieces[index].last_layer
        waiting = sequence.watermarks[index] - sequence.head_watermarks.get(layer, sequence.watermarks[index])
        return (
            self.runner.heads[layer].is_whole
            and self.runner.heads[None].is_whole
            and takes_likeliest(sequence, len(sequence.tokens))
            and not sequence.num_drafts
            and sequence.num_pending(0) == 1
            and not any(sequence.num_pending(i) for i in range(1, len(self.pieces)))
            and set(sequence.head_watermarks) <= {layer}
            and waiting < calls.MOST_TOKENS
        )

    def run(self, sequence: Sequence, index: int, sure: float, room: int, speculation: Speculation) -> LoneRound:
        """Drafts up to `room` tokens behind piece `index`, which `serves`, the first one where the exit is as confident
        as `sure`.
        """
        layer, position = self.pieces[index].last_layer, sequence.num_fed - 1
        assert sequence.places is not None and self.runner.words is not None
        most = min(room, len(sequence.places.index) - 1 - position, calls.MOST_TOKENS - 1)
        states = torch.empty(most + 1, self.runner.config.hidden_size, dtype=self.runner.words.dtype)
        told = torch.empty(2, most + 1, 2, dtype=torch.float64)
        late = torch.cat(waiting) if (waiting := sequence.head_states.get(layer)) else states[:0]
        odds = array("d", [speculation.records[layer].odds(place) for place in range(len(EDGES))])
        ends = array("q", sequence.stop_ids)
        rule = calls.DraftRule(
            sequence.drafts.plan.get(layer, 0.0),
            speculation.worth(sequence, layer, 1),
            self._edges.buffer_info()[0],
            odds.buffer_info()[0],
            len(EDGES),
            ends.buffer_info()[0] if ends else None,
            len(ends),
        )
        round_ = calls.Round(
            sequence.tokens[-1],
            position,
            most,
            torch.get_num_threads(),
            len(late),
            sure,
            sequence.places.address,
            *(table.data_ptr() for table in self.runner.tables),
            self.runner.words.data_ptr(),
            late.data_ptr(),
            said=told[0].data_ptr(),
            checked=told[1].data_ptr(),
        )
        calls.run_round(self.runner.layers_of(0, index).shape, self._route(index), rule, round_, states)
        self._move_on(sequence, layer, round_, states)
        said, checked = told[0, : round_.num_asked], told[1, : round_.num_drafted + 1]
        return LoneRound(_answers(said), round_.num_drafted, _answers(checked), round_.seconds_in_heads)

    def _move_on(
        self, sequence: Sequence, layer: int, round_: calls.Round, states: torch.Tensor
    ) -> None:  # [most + 1, h]
        sequence.num_fed += round_.num_drafted
        sequence.watermarks = [sequence.num_fed] * len(self.pieces)
        if layer in sequence.head_watermarks:
            if round_.num_asked:
                sequence.head_watermarks[layer], sequence.head_states[layer] = round_.position + round_.num_asked, []
            if round_.num_asked <= round_.num_drafted:  # the newest draft passed the exit without being asked
                sequence.head_states[layer].append(states[round_.num_drafted : round_.num_drafted + 1])

    def _route(self, index: int) -> calls.Route:
        if index not in self._routes:
            layer, runner = self.pieces[index].last_layer, self.runner
            before, behind = runner.layers_of(0, index).native, runner.layers_of(index + 1, len(self.pieces) - 1).native
            head, final = runner.exit_heads[layer], runner.heads[None]
            assert before is not None and behind is not None and head.native is not None and final.native is not None
            own = runner.head_layers.layer_of(layer).native if layer in runner.head_layers.own else None
            route = self._routes[index] = calls.Route(
                before, len(before), own, None, head.head.takes_mlp_input, behind, len(behind)
            )
            route.head.contents, route.final_head.contents = head.native, final.native
        return self._routes[index]


def _answers(top: torch.Tensor) -> list[Answer]:  # [tokens, 2]
    return [Answer(confidence, int(token), None, None) for token, confidence in top.tolist()]
