"""Long work on some ranks while others wait: all ranks meet regularly, so that no collective times out."""

import time
from collections.abc import Generator, Iterator

import torch.distributed as dist

from ee_tuning.errors import InputError
from ee_tuning.parallel.collectives import RankFailure
from ee_tuning.parallel.topology import Topology

_HEARTBEAT_SECONDS = 20.0


def run_with_heartbeat(steps: Iterator[None], topology: Topology) -> None:
    """Runs this rank's `steps`, each much shorter than a minute, while other ranks run theirs or wait. All ranks call
    it.

    If a step fails on one rank, all ranks raise: the same InputError, or else that rank's own exception and a
    RuntimeError on the others.
    """
    is_done, failure = False, None
    while True:
        until = time.monotonic() + _HEARTBEAT_SECONDS
        while not is_done:
            try:
                next(steps)
            except StopIteration:
                is_done = True
            except Exception as error:  # reported to the other ranks before it is raised, since they wait for this one
                is_done, failure = True, error
            if time.monotonic() >= until:
                break
        answers: list[tuple[bool, RankFailure | None]] = [(False, None)] * topology.world_size
        dist.all_gather_object(answers, (is_done, RankFailure.of(failure, topology.rank)), group=topology.world_control)
        if failures := [each for _, each in answers if each is not None]:
            if isinstance(steps, Generator):
                steps.close()  # removes partial outputs
            crash = next((each for each in failures if not each.is_refusal), None)
            if crash is not None and failure is not None and not isinstance(failure, InputError):
                raise failure
            raise (crash or failures[0]).error()
        if all(done for done, _ in answers):
            return
