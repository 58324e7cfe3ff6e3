"""How the stages of a decoder talk: hidden states go on to the next stage, what a stage has decided goes to everybody.
Knows no exits.

Nobody waits for a send. A stage that hands states on, or says what it decided, goes on at once; whoever needs either
waits for it when it comes to that place. So a stage lags behind another by as many messages as may be under way, and no
more. Every rank sends and receives in the order of one and the same program, and the oldest operation that anybody
waits for can always be
finished: that is why this can not deadlock, as long as a stage may post what others hear later in that program.
"""

import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.p2p import irecv, isend
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

# t tokens · h hidden


class StageLink:
    """This rank's end. Of each kind of message `max_in_flight` may be under way to every receiver."""

    def __init__(self, topology: Topology, *, max_in_flight: int = 16):
        assert max_in_flight >= 1, max_in_flight
        self.seconds_waited = 0.0
        """Time spent in waiting for other stages, so far. On a GPU, the host's alone."""
        self._topology = topology
        self._hidden = _Outbox(max_in_flight)
        # As many steps are on their way as there are stages, and may wait as long again behind older ones
        # (`whole_step.py`).
        self._decisions = _Outbox(max(max_in_flight, 2 * topology.pp))

    def send(self, hidden: Tensor) -> None:  # [t, h]
        """Hands hidden states on to the next stage. They may be read, but not written, afterwards."""
        began = time.perf_counter()
        hidden, peer = hidden.contiguous(), self._topology.pp_ranks[self._topology.stage + 1]
        self._hidden.keep(hidden, [isend(hidden, peer, self._topology.pp_group)])
        self.seconds_waited += time.perf_counter() - began

    def receive(self, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:  # [t, h]
        """The oldest hidden states of the stage before that were not received yet."""
        began = time.perf_counter()
        hidden, peer = (
            torch.empty(num_tokens, width, dtype=dtype, device=self._topology.device),
            self._topology.stage - 1,
        )
        with hang_watchdog(self._topology, f"hidden states from stage {peer} (rank {self._topology.pp_ranks[peer]})"):
            irecv(hidden, self._topology.pp_ranks[peer], self._topology.pp_group).wait()
        self.seconds_waited += time.perf_counter() - began
        return hidden

    def broadcast(self, decided: Tensor, stage: int) -> None:
        """Overwrites `decided`, of one shape on every rank and on the CPU, with that of a stage's first rank, where it
        may not be written afterwards.
        """
        self.send_decision(decided, stage)
        self.recv_decision(decided, stage)

    def is_source(self, stage: int) -> bool:
        """Whether this rank says what a stage decided."""
        return self._topology.rank == self._topology.first_rank_of_stage(stage)

    def send_decision(self, decided: Tensor, stage: int) -> None:
        """The sending half of `broadcast`; nothing is done on other ranks than the stage's first."""
        if self._topology.num_in_replica == 1 or not self.is_source(stage):
            return
        began, group = time.perf_counter(), self._topology.replica_control
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != self._topology.rank]
        self._decisions.keep(decided, [dist.isend(decided, rank, group=group) for rank in others])
        self.seconds_waited += time.perf_counter() - began

    def recv_decision(self, decided: Tensor, stage: int) -> None:
        """The receiving half of `broadcast`; does nothing on the stage's first rank. Decisions of a stage arrive in the
        order in which they were sent.
        """
        if self._topology.num_in_replica == 1 or self.is_source(stage):
            return
        began, source = time.perf_counter(), self._topology.first_rank_of_stage(stage)
        with hang_watchdog(self._topology, f"what stage {stage} (rank {source}) decides"):
            dist.recv(decided, source, group=self._topology.replica_control)
        self.seconds_waited += time.perf_counter() - began

    def finish(self) -> None:
        """Waits until everything sent has arrived."""
        self._hidden.wait(0)
        self._decisions.wait(0)


class _Outbox:
    """Sends under way, and the tensors that they read."""

    def __init__(self, max_in_flight: int):
        self._max_in_flight = max_in_flight
        self._under_way: deque[tuple[Tensor, list[Any]]] = deque()

    def keep(self, tensor: Tensor, works: list[Any]) -> None:
        self._under_way.append((tensor, works))
        self.wait(self._max_in_flight)

    def wait(self, at_most: int) -> None:
        """Waits until so many messages are under way."""
        while len(self._under_way) > at_most:
            for work in self._under_way.popleft()[1]:
                work.wait()
