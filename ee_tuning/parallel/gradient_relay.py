"""Sends the gradient of hidden states from each pipeline stage to the one before, micro-batch by micro-batch.

It is the relay's other direction, with a process group of its own: on the relay's group, a receive that waits for the
next micro-batch would block the gradients behind it.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.p2p import MAX_IN_FLIGHT, PendingSends, irecv, isend
from ee_tuning.parallel.process_groups import own_group
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog


class GradientRelay:
    """This stage's end. The order of gradients is that of the micro-batches.

    All ranks create it together.
    """

    def __init__(self, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype, *, minutes: float) -> None:
        """`shape` and `dtype` describe the hidden states of one micro-batch; `minutes` is the timeout of a message."""
        self.seconds_waited = 0.0
        """Seconds that this stage has waited for other stages. On a GPU only the host's waiting counts."""
        self._topology, self._shape, self._dtype = topology, shape, dtype
        self._pending = PendingSends(topology, MAX_IN_FLIGHT)
        per_stage = topology.tp * topology.dp
        columns = [[stage * per_stage + i for stage in range(topology.pp)] for i in range(per_stage)]
        self._group = (
            own_group(columns, rank=topology.rank, timeout=timedelta(minutes=minutes), backend=dist.get_backend())
            if topology.pp > 1
            else None
        )

    def send(self, gradient: Tensor) -> None:
        """Sends the gradient of what this stage received. The caller must not write to it afterwards."""
        assert not self._topology.is_first_stage and gradient.shape == self._shape and gradient.dtype == self._dtype
        peer, gradient = self._topology.pp_ranks[self._topology.stage - 1], gradient.contiguous()
        to = f"stage {self._topology.stage - 1} (rank {peer})"
        with hang_watchdog(self._topology, f"a connection to {to}"):
            work = isend(gradient, peer, self._group)
        self.seconds_waited += self._pending.add([gradient], [work], f"{to} to take a gradient")

    @part("waiting")
    def receive(self) -> Tensor:
        """Receives the gradient of what this stage sent for the oldest micro-batch whose gradient is missing."""
        began, peer = time.perf_counter(), self._topology.pp_ranks[self._topology.stage + 1]
        gradient = torch.empty(self._shape, dtype=self._dtype, device=self._topology.device)
        with hang_watchdog(self._topology, f"a gradient from stage {self._topology.stage + 1} (rank {peer})"):
            irecv(gradient, peer, self._group).wait()
        self.seconds_waited += time.perf_counter() - began
        return gradient

    def finish(self) -> None:
        """Waits until all sends have finished."""
        self.seconds_waited += self._pending.wait()
