"""Hands hidden states from one pipeline stage to the next, micro-batch after micro-batch, forward only. Knows no exits.

Every micro-batch is a header on `pp_control` (gloo, CPU) and hidden states on `pp_group` (gloo or NCCL, `p2p.py`).
The header says what follows, so a wish to stop or to save travels with the activations, and a receive that nobody will
answer is never posted.
"""

import enum
import time
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.p2p import irecv, isend
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog


class NextAction(enum.IntEnum):
    """What comes after a micro-batch. Of several wishes the smallest has its way."""

    END = 0
    """Nothing."""
    SAVE = 1
    """Another one, at once, and a checkpoint of the steps so far."""
    NEXT = 2
    """Another one, at once."""


class Received(NamedTuple):
    """One micro-batch from the stage before."""

    hidden: Tensor
    """The relay's shape and dtype, on the topology's device; the receiver's to keep."""
    next_action: NextAction


class _Transfer(NamedTuple):
    """A header and hidden states under way, with what has to live until they have arrived."""

    header: Tensor  # [2] int64: number of the micro-batch, what follows
    hidden: Tensor
    header_work: Any
    hidden_work: Any

    def wait(self) -> None:
        self.header_work.wait()
        self.hidden_work.wait()


class Relay:
    """This stage's place in the relay. One Relay serves one run: from the first micro-batch to the one sent with
    `NextAction.END`.

    On NCCL a receive posted ahead may not block the send behind it: they run on communicators of their own because the
    process groups are made without `device_id`, and then PyTorch gives every unbatched pair of ranks one.
    """

    def __init__(
        self, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype, *, max_in_flight: int = 2
    ) -> None:
        """`shape` and `dtype` of the hidden states of one micro-batch; `max_in_flight` sends may be unfinished at a
        time.
        """
        assert max_in_flight >= 1, f"max_in_flight must be at least 1, got {max_in_flight}"
        self.seconds_waited = 0.0
        """Time spent in waiting for other stages, so far. On a GPU, the host's alone."""
        self._topology, self._shape, self._dtype, self._max_in_flight = topology, shape, dtype, max_in_flight
        self._sending: deque[_Transfer] = deque()
        self._num_sent = self._num_received = 0
        self._receiving: _Transfer | None = None
        self._more_to_come = not topology.is_first_stage

    def receive(self) -> Received:
        """The next micro-batch of the stage before. If another one follows, its receive is under way when this returns:
        it ends with the stage before's next send, so nobody may wait for the whole device meanwhile.
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
        """Sends `hidden` on and returns at once, unless more than `max_in_flight` sends are under way.

        `hidden` may be read but not written by the caller afterwards.
        """
        assert not self._topology.is_last_stage, "the last stage has nobody to send to"
        assert hidden.shape == self._shape and hidden.dtype == self._dtype, (
            f"{hidden.shape} {hidden.dtype} is not what was agreed"
        )
        peer = self._topology.pp_ranks[self._topology.stage + 1]
        header, hidden = torch.tensor([self._num_sent, int(next_action)]), hidden.detach().contiguous()
        self._sending.append(
            _Transfer(
                header,
                hidden,
                dist.isend(header, peer, group=self._topology.pp_control),
                isend(hidden, peer, self._topology.pp_group),
            )
        )
        self._num_sent += 1
        self._wait_for_sends(self._max_in_flight)

    def finish(self) -> None:
        """Waits for the sends under way."""
        self._wait_for_sends(0)

    def _wait_for_sends(self, max_in_flight: int) -> None:
        began, stage = time.perf_counter(), self._topology.stage + 1
        while len(self._sending) > max_in_flight:
            index = self._num_sent - len(self._sending) + 1
            with hang_watchdog(
                self._topology, f"stage {stage} (rank {self._topology.pp_ranks[stage]}) to take micro-batch {index}"
            ):
                self._sending.popleft().wait()
        self.seconds_waited += time.perf_counter() - began

    def _post_receive(self) -> _Transfer:
        # A buffer of its own for each micro-batch: two live at a time, and the receiver may keep what it got.
        peer = self._topology.pp_ranks[self._topology.stage - 1]
        header = torch.empty(2, dtype=torch.int64)
        hidden = torch.empty(self._shape, dtype=self._dtype, device=self._topology.device)
        return _Transfer(
            header,
            hidden,
            dist.irecv(header, peer, group=self._topology.pp_control),
            irecv(hidden, peer, self._topology.pp_group),
        )
