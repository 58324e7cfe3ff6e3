"""Steps of sequences that decode side by side, each stage's part at one go: over stages, so that none waits for what it
need not know; in one process by one call of the kernels, for what lies between two segments would cost more than a
shallow one.

They do what `PieceWalk` does piece by piece, where all sequences decode by one policy and take the likeliest token.
"""

from collections import deque
from collections.abc import Set

from ee_tuning.generation.flight import Flight
from ee_tuning.generation.judge import Left
from ee_tuning.generation.policy import FULL, Policy
from ee_tuning.generation.processors import takes_likeliest
from ee_tuning.generation.route import Route
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence


class WholeSteps:
    """The steps on their way of an engine: over several stages, those of tokens that later ones decide about."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.is_able = True
        """Whether steps are taken so where they can be."""
        self._flights: deque[Flight] = deque()
        """The flights in the order in which they went on to the stage that they wait for: its words come in that order.
        """
        self._held: list[Sequence] = []
        """Those that a step left out."""
        self._clock = 0
        self.busy: Set[int] = frozenset()
        """Numbers of the sequences that wait for a later stage's word."""
        self._newest: Route | None = None
        self.seconds_in_heads = 0.0
        """The time in heads on this rank, of steps that are over."""

    def begin(self, rows: list[Sequence]) -> list[Left] | None:
        """Begins a step of `rows`, their newest tokens at the entrance, and says who left so far; None where the pieces
        have to be gone through one by one.
        """
        policy, route = _taken_as(rows[0]), self._newest
        if not self.is_able or not all([_is_known(s, policy) for s in rows]):
            return None
        if route is None or (route.policy is not policy and route.policy != policy):
            route = self._newest = Route(self.runner, policy, rows[0].last_piece)
        if not route.serves or not route.fits(rows):
            return None
        return self._proceed(Flight(self.runner, route, self._share_of(rows, route), self._clock))

    def hear_due(self) -> list[Left]:
        """Ends a step of the engine, by what it is time to hear: a stage's word comes as many steps after a step began
        as the stage lies behind the first one.
        """
        left: list[Left] = []
        while self._flights and self._flights[0].due <= self._clock:
            left += self.proceed()
        self._clock += 1
        return left

    def proceed(self) -> list[Left]:
        """Takes the oldest step on by one stage's word."""
        return self._proceed(self._flights.popleft())

    def _share_of(self, rows: list[Sequence], route: Route) -> list[Sequence]:
        """Those that begin a step. Where nobody can leave in the first stage, all rows in one step would keep one stage
        busy at a time: as many steps as stages share them. Who was left out comes first the next time.
        """
        self._held, held = [], [s for s in self._held if s in rows]
        if route.num_busy_stages == 1 or route.parts[0].decides:
            return rows
        rows = [*held, *(s for s in rows if s not in held)]
        share = -(-(len(rows) + len(self.busy)) // route.num_busy_stages)
        self._held = rows[share:]
        return rows[:share]

    def _proceed(self, flight: Flight) -> list[Left]:
        left = flight.proceed()
        if flight.undecided:
            self._flights.append(flight)
        else:
            self.seconds_in_heads += flight.seconds_in_heads
        if self._flights or self.busy:
            self.busy = {s.number for flight in self._flights for s in flight.undecided}
        return left


def _taken_as(sequence: Sequence) -> Policy:
    """The policy of a sequence's next step: one that speculates goes to full depth where nothing is drafted."""
    is_plain = (
        sequence.policy.drafts_at
        and not sequence.drafts.plan
        and not sequence.num_drafts
        and not sequence.head_watermarks
    )
    return FULL if is_plain else sequence.policy


def _is_known(sequence: Sequence, policy: Policy) -> bool:
    """Whether a sequence wants the likeliest token after its newest one and nothing more, by this policy."""
    own = _taken_as(sequence)
    return (
        (own is policy or own == policy)
        and not policy.drafts_at
        and sequence.has_all_fed
        and sequence.num_output > 0
        and takes_likeliest(sequence, len(sequence.tokens))
    )
