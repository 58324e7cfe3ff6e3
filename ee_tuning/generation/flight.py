"""One step of some sequences through the stages, each stage's part of it at one go.

The first stage decides who leaves in it, says so, and is done with the step: it goes on with those that left, while
later stages take the others through, and with them the keys and values that are missing there. A later stage takes all
it is given to its end, whoever leaves on the way; who did is heard when the engine asks for it. Between these moments
every rank knows the same.
"""

import torch
from torch import Tensor

from ee_tuning.generation.judge import Answer, Left
from ee_tuning.generation.part_call import Called, Word, call_part, fill_part
from ee_tuning.generation.route import Part, Route
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.kernel.calls import STAYS

# t tokens · h hidden


class Flight:
    """All ranks call `proceed` at the same moments."""

    def __init__(self, runner: Runner, route: Route, rows: list[Sequence], begun: int):
        """`begun` tells the engine's step."""
        self._runner, self._route, self._rows, self._begun = runner, route, rows, begun
        self.undecided = rows
        """Those whose newest token has not left yet, as far as all ranks know."""
        self.seconds_in_heads = 0.0
        self._num_begun = 0
        self._unheard: tuple[Part, list[Word] | None] | None = None
        """A part whose decisions not every rank knows, and on the rank that took them its words."""

    @property
    def due(self) -> int:
        """The engine's step at which the stage that is waited for has had time for this one."""
        return self._begun + (self._unheard[0].stage if self._unheard else 0)

    def proceed(self) -> list[Left]:
        """Goes on to the next stage behind the first one that decides. Returns who left since the last call, shallow
        ones first; nobody is undecided when it is over.
        """
        left: list[Left] = []
        if self._unheard is not None:
            part, words = self._unheard
            left += self._leave(part, self._words(part, words), len(part.ends))
            self._unheard, self._rows = None, self.undecided  # those that left in the first stage have gone on by now
        while self.undecided and self._unheard is None:
            part = self._route.parts[self._num_begun]
            self._num_begun += 1
            if part.stage == 0:
                left += self._through_first(part)
            else:
                words = self._through(part)
                self._unheard = (part, words) if part.decides else None
        return left

    def _through_first(self, part: Part) -> list[Left]:
        """Runs the first stage as deep as any row goes."""
        called = self._call(part, None, [1] * len(self._rows)) if self._is_here(part) else None
        words = self._words(part, called.words if called else None)
        is_deep = any([word[0] == STAYS for word in words])
        num_run = len(part.ends) if is_deep else int(max(word[0] for word in words)) + 1
        self._book(part, num_run, called)
        return self._leave(part, words, num_run)

    def _through(self, part: Part) -> list[Word] | None:
        """Runs to the end of a later stage's part. Returns what it decided, where it did."""
        first, here = part.starts[0], self._runner.topology.stage
        counts = [s.num_pending(first) for s in self._rows]
        called = None
        if here == self._runner.pieces[first - 1].stage:
            self._runner.link.send(torch.cat([states for s in self._rows for states in s.boundary[first]]))
            for sequence in self._rows:
                sequence.boundary[first].clear()
        elif self._is_here(part):
            entering = self._runner.link.receive(
                sum(counts), self._runner.config.hidden_size, self._runner.model.plan.dtype
            )
            called = self._call(part, entering, counts)
            if called.num_run < len(part.ends):
                called = fill_part(self._runner, self._route, part, self._rows, called)
        self._book(part, len(part.ends), called)
        return called.words if called else None

    def _call(self, part: Part, entering: Tensor | None, counts: list[int]) -> Called:
        """Runs a part until nobody goes on, and says at once who left: before what is missing is filled in behind
        them.
        """
        called = call_part(self._runner, self._route, part, self._rows, {*self.undecided}, entering, counts)
        self.seconds_in_heads += called.seconds_in_heads
        if part.decides and self._runner.topology.num_in_replica > 1:
            self._runner.link.send_decision(torch.tensor(called.words, dtype=torch.float64), part.stage)
        return called

    def _words(self, part: Part, own: list[Word] | None) -> list[Word]:
        """What a part's stage says, here."""
        if not part.decides:
            return [(STAYS, 0.0, 0.0)] * len(self._rows)
        if own is not None and self._runner.link.is_source(part.stage):
            return own
        heard = torch.empty(len(self._rows), 3, dtype=torch.float64)
        self._runner.link.recv_decision(heard, part.stage)
        return heard.tolist()

    def _is_here(self, part: Part) -> bool:
        return part.stage == self._runner.topology.stage

    def _book(self, part: Part, num_run: int, called: Called | None) -> None:
        """All rows have gone through the first `num_run` segments of a part, behind which their states wait where it
        was `called`.
        """
        first, index = part.starts[0], part.ends[num_run - 1]
        num_pieces, place = index + 1 - first, 0
        states = None if called is None or index == self._route.last_piece else called.states
        is_going = self._membership()
        for r, sequence in enumerate(self._rows):
            marks, num_fed = sequence.watermarks, sequence.num_fed
            sequence.statistics.num_catch_up += num_pieces * (num_fed - is_going[r]) - sum(marks[first : index + 1])
            for piece in range(first, index + 1):
                marks[piece] = num_fed
                if sequence.boundary[piece]:
                    sequence.boundary[piece].clear()
            if states is not None and called is not None:
                sequence.boundary[index + 1].append(states[place : place + called.counts[r]])
                place += called.counts[r]

    def _leave(self, part: Part, words: list[Word], num_run: int) -> list[Left]:
        """Those of a part's rows that its words let go; of the network's last one all, though a broken model's NaN
        passes no threshold.
        """
        is_last, pieces, reached = part.ends[-1] == self._route.last_piece, self._runner.pieces, part.ends[num_run - 1]
        left: list[Left] = []
        stay = []
        for sequence, (segment, token, confidence), is_going in zip(self._rows, words, self._membership(), strict=True):
            if not is_going:
                continue
            if segment == STAYS and not is_last:
                stay.append(sequence)
                continue
            place = part.ends[int(segment)]  # STAYS is the last one, too
            sequence.statistics.num_catch_up += reached - place
            left.append(Left(sequence, Answer(confidence, int(token), None, None), pieces[place].last_layer))
        self.undecided = stay
        return sorted(left, key=lambda each: each.layer) if len(left) > 1 else left

    def _membership(self) -> list[bool]:
        """Whether each row is undecided."""
        if len(self.undecided) == len(self._rows):
            return [True] * len(self._rows)
        undecided = {*self.undecided}
        return [sequence in undecided for sequence in self._rows]
