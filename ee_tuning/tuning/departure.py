"""What follows a micro-batch: the first stage decides, and its word travels with the activations, so every stage does the same."""
import time

import torch
import torch.distributed as dist

from ee_tuning.config import TuningSection
from ee_tuning.parallel.relay import Follows
from ee_tuning.parallel.topology import Topology
from ee_tuning.tuning.itinerary import Leg
from ee_tuning.tuning.stopping import StopRequest


class Departure:
    """Decides where the run pauses for a checkpoint and where it ends."""

    def __init__(self, tuning: TuningSection, topology: Topology, stop: StopRequest) -> None:
        self._tuning, self._topology, self._stop = tuning, topology, stop
        self._saved_at = time.monotonic()

    def follows(self, leg: Leg) -> Follows:
        """After `leg`. All ranks of the first stage call it together; on other stages it says nothing of worth."""
        if not leg.is_last or not self._topology.is_first_stage:
            return Follows.NEXT
        if leg.step == self._tuning.train_iters:  # the end is near enough for who wants to stop
            return Follows.END if leg.ends_step else Follows.NEXT
        if self._stop.is_asked:
            wish = Follows.END
        else:
            wish = Follows.PAUSE if leg.ends_step and leg.step and (self._is_due(leg.step) or self._minutes_passed()) else Follows.NEXT
        return self._smallest(wish)

    def saved(self) -> None:
        """A checkpoint was just written."""
        self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        interval = self._tuning.save_interval
        return bool(interval) and step % interval == 0

    def _minutes_passed(self) -> bool:
        minutes = self._tuning.save_minutes
        return bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes

    def _smallest(self, wish: Follows) -> Follows:
        if self._topology.tp * self._topology.dp == 1:
            return wish
        agreed = torch.tensor([int(wish)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._topology.stage_control)
        return Follows(int(agreed.item()))
