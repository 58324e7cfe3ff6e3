"""Long work on some ranks while others wait: all ranks meet regularly, so that no collective times out."""

import time
from collections.abc import Generator, Iterator

import torch.distributed as dist

from ee_tuning.errors import InputError
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
        answers: list[tuple[bool, str | None, str | None]] = [(False, None, None)] * topology.world_size
        is_refusal = isinstance(failure, InputError)
        failure_text = (
            None if failure is None else str(failure) if is_refusal else f"{type(failure).__name__}: {failure}"
        )
        dist.all_gather_object(
            answers,
            (is_done, failure_text if is_refusal else None, None if is_refusal else failure_text),
            group=topology.world_control,
        )
        refusals = [text for _, text, _ in answers if text is not None]
        crashes = [f"rank {rank} failed: {text}" for rank, (_, _, text) in enumerate(answers) if text is not None]
        if (refusals or crashes) and isinstance(steps, Generator):
            steps.close()  # removes partial outputs
        if crashes:
            raise failure if failure is not None and not is_refusal else RuntimeError(crashes[0])
        if refusals:
            raise InputError(refusals[0])
        if all(done for done, _, _ in answers):
            return
