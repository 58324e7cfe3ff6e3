"""Runs a program that queries the model on rank 0, while the other ranks serve its queries (a driver and its workers).

So third-party programs (lm-evaluation-harness) need not behave alike on all ranks: they read files, draw random
numbers, and write on rank 0 only. Each query is shared by the replicas.
"""

import dataclasses
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import Job
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.replicas import over_replicas
from ee_tuning.generation.scoring import Score, TokenPair, score_by, token_pairs
from ee_tuning.parallel.collectives import RankFailure
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.sampling.policy import Policy

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class _End:
    """The last message."""

    failure: RankFailure | None = None


@dataclasses.dataclass(frozen=True)
class TextScore:
    """The score of a continuation, summed over its tokens."""

    logprob: float
    is_greedy: bool
    """Whether each token was the likeliest one."""
    left: dict[int, int]
    """Layer -> number of tokens predicted there."""

    @classmethod
    def of(cls, score: Score) -> "TextScore":
        """Sums a score."""
        return cls(score.logprob, all(score.is_greedy), dict(Counter(score.exit_layers)))


class Driver:
    """Queries a model on all its ranks. Set `is_alone` in a single process, or where all ranks make the same calls."""

    def __init__(self, llm: EarlyExitLLM, *, is_alone: bool = True):
        self.llm, self._is_alone = llm, is_alone
        self._policies: list[Policy] = []
        self._known: dict[bytes, list[TextScore]] = {}

    def expect(self, policies: Sequence[Policy]) -> None:
        """Announces the policies under which the same continuations will be scored, so that one pass can serve all of
        them.
        """
        self._policies, self._known = list(policies), {}

    def score(self, pairs: Sequence[TokenPair], policy: Policy, batch_size: int) -> list[TextScore]:
        """Like `EarlyExitLLM.score`, summed."""
        if policy not in self._policies:
            return [each for (each,) in self._ask(_score, list(pairs), [policy], batch_size)]
        keys = [_key(pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, self._ask(_score, list(new.values()), self._policies, batch_size), strict=True))
        place = self._policies.index(policy)
        return [self._known[key][place] for key in keys]

    def complete(self, jobs: Sequence[Job], batch_size: int) -> list[Completion]:
        """Returns a completion for each job, which must ask for one. Raises InputError where one is impossible."""
        return self._ask(_complete, list(jobs), batch_size)

    def _ask(self, action: Callable[..., Result], *arguments: Any) -> Result:
        if not self._is_alone:
            self.llm.model.topology.broadcast_object((action, arguments))
        return action(self.llm, *arguments)


def drive(llm: EarlyExitLLM, program: Callable[[Driver], Result]) -> Result | None:
    """Runs `program` on rank 0 and returns its result there, None elsewhere. All ranks call it.

    If it fails, all ranks raise: its InputError, or else its own exception on rank 0 and a RuntimeError on the others.
    """
    topology = llm.model.topology
    if topology.world_size == 1:
        return program(Driver(llm))
    if not topology.is_logging_rank:
        _work(llm)
        return None
    end = _End()
    try:
        return program(Driver(llm, is_alone=False))
    except Exception as error:
        end = _End(RankFailure.of(error, 0))
        raise
    finally:
        topology.broadcast_object(end)


def _work(llm: EarlyExitLLM) -> None:
    topology = llm.model.topology
    while True:
        with hang_watchdog(topology, "what rank 0 asks next"):
            message = topology.broadcast_object()
        if isinstance(message, _End):
            break
        action, arguments = message
        with suppress(InputError):  # rank 0 gets the same error and decides whether to end
            action(llm, *arguments)
    if message.failure is not None:
        raise message.failure.error()


def _key(pair: TokenPair) -> bytes:
    context, continuation = pair
    return hashlib.blake2b(array("q", [len(context), *context, *continuation]).tobytes(), digest_size=16).digest()


def _score(llm: EarlyExitLLM, pairs: list[TokenPair], policies: list[Policy], batch_size: int) -> list[list[TextScore]]:
    """Returns the summed scores of each pair under each policy."""

    def score(share: list[TokenPair]) -> list[list[TextScore]]:
        scores = score_by(llm.model, token_pairs(llm.model, llm.encode, share), policies, batch_size)
        return [[TextScore.of(each) for each in of_pair] for of_pair in zip(*scores, strict=True)]

    return over_replicas(pairs, score, llm.model.topology)


def _complete(llm: EarlyExitLLM, jobs: list[Job], batch_size: int) -> list[Completion]:
    def complete(share: list[Job]) -> list[Completion]:
        completions: list[Completion] = []
        for _ in llm.run(
            share, completions, dataclasses.replace(llm.defaults, max_batch_size=batch_size), shows_text=False
        ):
            pass
        return completions

    return over_replicas(jobs, complete, llm.model.topology)
