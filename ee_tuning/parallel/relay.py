"""Sends hidden states from each pipeline stage to the next, micro-batch by micro-batch, forward only. Exits play no
part here.

A micro-batch consists of a header on `pp_control` (gloo, CPU) and hidden states on `pp_group` (gloo or NCCL, `p2p.py`).
The header holds the next action, so a request to stop or to save travels with the activations, and a stage never posts
a receive that will not be answered.
"""

import enum
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.p2p import MAX_IN_FLIGHT, PendingSends, irecv, isend
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog


class NextAction(enum.IntEnum):
    """The action after a micro-batch. Among several requests the smallest value wins."""

    END = 0
    """The run ends."""
    SAVE = 1
    """Another micro-batch follows at once, and the stage saves a checkpoint of the steps so far."""
    NEXT = 2
    """Another micro-batch follows at once."""


class Received(NamedTuple):
    """A micro-batch from the previous stage."""

    hidden: Tensor
    """Hidden states in the relay's shape and dtype, on the topology's device. The receiver may keep them."""
    next_action: NextAction


class _Receive(NamedTuple):
    """A posted receive of a header and hidden states."""

    header: Tensor  # [2] int64: number of the micro-batch, next action
    hidden: Tensor
    header_work: Any
    hidden_work: Any


class Relay:
    """This stage's end of the relay. One Relay serves one run: until the micro-batch with `NextAction.END`.

    On NCCL, a receive posted ahead must not block the send behind it. It does not, because the process groups are
    created without `device_id`, and PyTorch then gives every pair of ranks a communicator of its own.
    """

    def __init__(
        self,
        topology: Topology,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        sends: tuple[int, ...] | None = None,
    ) -> None:
        """`shape` and `dtype` describe the received hidden states of one micro-batch, `sends` the shape of the sent
        ones if it differs.
        """
        self.seconds_waited = 0.0
        """Seconds that this stage has waited for other stages. On a GPU only the host's waiting counts."""
        self._topology, self._shape, self._dtype = topology, shape, dtype
        self._sends = shape if sends is None else sends
        self._pending = PendingSends(topology, MAX_IN_FLIGHT)
        self._num_sent = self._num_received = 0
        self._receiving: _Receive | None = None
        self._more_to_come = not topology.is_first_stage

    @part("waiting")
    def receive(self) -> Received:
        """Receives the next micro-batch from the previous stage.

        If another one follows, its receive is already posted when this returns. It completes with the previous stage's
        next send, so do not synchronize the whole device in between.
        """
        assert self._more_to_come, "nothing to receive: this is the first stage, or the last micro-batch said so"
        began = time.perf_counter()
        transfer = self._receiving or self._post_receive()
        stage, number = self._topology.stage - 1, self._num_received + 1
        what = f"micro-batch {number} from stage {stage} (rank {self._topology.pp_ranks[stage]})"
        with hang_watchdog(self._topology, what):
            transfer.header_work.wait()
        index, next_action = transfer.header.tolist()
        assert index == self._num_received, f"micro-batch {index} arrived in place of {self._num_received}"
        self._num_received += 1
        self._more_to_come = next_action != NextAction.END
        self._receiving = self._post_receive() if self._more_to_come else None
        with hang_watchdog(self._topology, what):
            transfer.hidden_work.wait()
        self.seconds_waited += time.perf_counter() - began
        return Received(transfer.hidden, NextAction(next_action))

    def send(self, hidden: Tensor, *, next_action: NextAction) -> None:
        """Sends `hidden` to the next stage. Returns at once unless more than MAX_IN_FLIGHT sends are unfinished.

        The caller may read `hidden` afterwards but must not write to it.
        """
        assert not self._topology.is_last_stage, "the last stage has nobody to send to"
        assert hidden.shape == self._sends and hidden.dtype == self._dtype, (
            f"{hidden.shape} {hidden.dtype} is not what was agreed"
        )
        peer, group = self._topology.pp_ranks[self._topology.stage + 1], self._topology.pp_group
        header, hidden = torch.tensor([self._num_sent, int(next_action)]), hidden.detach().contiguous()
        self._num_sent += 1
        taken = f"stage {self._topology.stage + 1} (rank {peer}) to take micro-batch {self._num_sent}"
        with hang_watchdog(self._topology, taken):
            works = dist.isend(header, peer, group=self._topology.pp_control), isend(hidden, peer, group)
        self.seconds_waited += self._pending.add((header, hidden), works, taken)

    def finish(self) -> None:
        """Waits until all sends have finished."""
        self.seconds_waited += self._pending.wait()

    def _post_receive(self) -> _Receive:
        # Each micro-batch has its own buffer: two are alive at a time, and the receiver may keep what it received.
        peer = self._topology.pp_ranks[self._topology.stage - 1]
        header = torch.empty(2, dtype=torch.int64)
        hidden = torch.empty(self._shape, dtype=self._dtype, device=self._topology.device)
        with hang_watchdog(self._topology, f"a connection to stage {self._topology.stage - 1} (rank {peer})"):
            header_work = dist.irecv(header, peer, group=self._topology.pp_control)
            return _Receive(header, hidden, header_work, irecv(hidden, peer, self._topology.pp_group))
