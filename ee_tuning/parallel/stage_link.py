"""Messages between the stages of a decoder: hidden states to the next stage, decisions to all stages. Exits play no
part here.

Sends do not block. A stage continues after sending hidden states or a decision, and a receiver waits only when it needs
the message. So a stage may run ahead of another by the number of messages in flight, and no more. All ranks send and
receive in the order of the same program, and the oldest pending operation can always complete; this is why the stages
can not deadlock, provided that every awaited message is sent at some point of that program.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.p2p import PendingSends, irecv, isend
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

# t tokens · h hidden

_MAX_IN_FLIGHT = 16
"""Most unfinished sends of one kind."""
_BESIDE = 1
"""Tag of messages that overtake decisions in flight."""


class StageLink:
    """This rank's end of the messages between stages. Of each kind, a bounded number is unfinished at a time."""

    def __init__(self, topology: Topology):
        self.seconds_waited = 0.0
        """Seconds that this stage has waited for other stages. On a GPU only the host's waiting counts."""
        self._topology = topology
        self._hidden = PendingSends(topology, _MAX_IN_FLIGHT)
        # As many steps are in flight as there are stages, and each may wait as long again behind older ones.
        self._decisions = PendingSends(topology, max(_MAX_IN_FLIGHT, 2 * topology.pp))

    def send(self, hidden: Tensor) -> None:  # [t, h]
        """Sends hidden states to the next stage. The caller may read them afterwards but must not write to them."""
        hidden, peer = hidden.contiguous(), self._topology.pp_ranks[self._topology.stage + 1]
        taken = f"stage {self._topology.stage + 1} (rank {peer}) to take hidden states"
        work = isend(hidden, peer, self._topology.pp_group)
        self.seconds_waited += self._hidden.add([hidden], [work], taken)

    @part("waiting")
    def receive(self, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:  # [t, h]
        """Receives the oldest pending hidden states of the previous stage."""
        began = time.perf_counter()
        hidden = torch.empty(num_tokens, width, dtype=dtype, device=self._topology.device)
        peer = self._topology.stage - 1
        with hang_watchdog(self._topology, f"hidden states from stage {peer} (rank {self._topology.pp_ranks[peer]})"):
            irecv(hidden, self._topology.pp_ranks[peer], self._topology.pp_group).wait()
        self.seconds_waited += time.perf_counter() - began
        return hidden

    def broadcast(self, decided: Tensor, stage: int) -> None:
        """Overwrites `decided` on every rank with the value on the first rank of `stage`, ahead of decisions of that
        stage that are in flight.

        `decided` lies on the CPU and has one shape on all ranks. The source must not write to it afterwards.
        """
        self.send_decision(decided, stage, tag=_BESIDE)
        self.recv_decision(decided, stage, tag=_BESIDE)

    def is_source(self, stage: int) -> bool:
        """Whether this rank sends the decisions of `stage`."""
        return self._topology.rank == self._topology.first_rank_of_stage(stage)

    def send_decision(self, decided: Tensor, stage: int, tag: int = 0) -> None:
        """The sending half of `broadcast`. Only the first rank of `stage` sends; elsewhere this does nothing."""
        if self._topology.num_in_replica == 1 or not self.is_source(stage):
            return
        group = self._topology.replica_control
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != self._topology.rank]
        works = [dist.isend(decided, rank, group=group, tag=tag) for rank in others]
        taken = f"other ranks to take the decision of stage {stage}"
        self.seconds_waited += self._decisions.add([decided], works, taken)

    def recv_decision(self, decided: Tensor, stage: int, tag: int = 0) -> None:
        """The receiving half of `broadcast`. Does nothing on the first rank of `stage`.

        Decisions of a stage arrive in the order in which they were sent.
        """
        if self._topology.num_in_replica == 1 or self.is_source(stage):
            return
        began, source = time.perf_counter(), self._topology.first_rank_of_stage(stage)
        with hang_watchdog(self._topology, f"the decision of stage {stage} (rank {source})"):
            dist.recv(decided, source, group=self._topology.replica_control, tag=tag)
        self.seconds_waited += time.perf_counter() - began

    @property
    def num_pending(self) -> int:
        """Number of sends, of hidden states and decisions, that may be unfinished."""
        return len(self._hidden) + len(self._decisions)

    def finish(self) -> None:
        """Waits until all messages have been received."""
        self.seconds_waited += self._hidden.wait() + self._decisions.wait()
