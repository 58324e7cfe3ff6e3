"""Sends one tensor per micro-batch back from the last stage to earlier ones, against the direction of the relay.

It has a process group of its own: on the relay's group, a receive that waits for the last stage would block the hidden
states behind it. This file does not depend on teachers.
"""

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ee_tuning.parallel.p2p import MAX_IN_FLIGHT, PendingSends, irecv, isend
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog


class Feedback:
    """This stage's end of the channel.

    Every stage in `stages` must call `expect` for a tensor before the last stage sends it, and `take` afterwards.
    """

    def __init__(self, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype, stages: tuple[int, ...]) -> None:
        """`shape` and `dtype` describe the tensors; `stages` receive them."""
        assert all(0 <= stage < topology.pp - 1 for stage in stages), stages
        self.seconds_waited = 0.0
        """Seconds that this stage has waited for other stages. On a GPU only the host's waiting counts."""
        self._topology, self._shape, self._dtype, self._stages = topology, shape, dtype, stages
        self._pending = PendingSends(topology, MAX_IN_FLIGHT * max(1, len(stages)))
        self._expected: deque[tuple[Tensor, Any]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Sends `tensor` from the last stage. The caller must not write to it afterwards."""
        assert self._topology.is_last_stage and tensor.shape == self._shape and tensor.dtype == self._dtype
        tensor = tensor.detach().contiguous()
        for stage in self._stages:
            peer = self._topology.pp_ranks[stage]
            work = isend(tensor, peer, self._topology.feedback_group)
            taken = f"stage {stage} (rank {peer}) to take the feedback on a micro-batch"
            self.seconds_waited += self._pending.add([tensor], [work], taken)

    def expect(self) -> None:
        """Posts the receive of the next tensor on a stage of `stages`, and returns at once."""
        assert self._topology.stage in self._stages
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._topology.device)
        self._expected.append((tensor, irecv(tensor, self._topology.pp_ranks[-1], self._topology.feedback_group)))

    @part("waiting")
    def take(self) -> Tensor:
        """Waits for the oldest expected tensor and returns it. The caller may keep it."""
        began = time.perf_counter()
        tensor, work = self._expected.popleft()
        with hang_watchdog(
            self._topology, f"what the last stage (rank {self._topology.pp_ranks[-1]}) sends back for a micro-batch"
        ):
            work.wait()
        self.seconds_waited += time.perf_counter() - began
        return tensor

    def finish(self) -> None:
        """Waits on the last stage until all sends have finished."""
        self.seconds_waited += self._pending.wait()
