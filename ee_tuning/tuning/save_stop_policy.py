"""Decides, on the first stage, when a run saves and when it stops. The decision travels with the activations."""

import time

import torch
import torch.distributed as dist

from ee_tuning.config import TuningSection
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import Topology
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.stopping import StopRequest


class SaveStopPolicy:
    """Decides when checkpoints are saved and when the run ends."""

    def __init__(self, tuning: TuningSection, topology: Topology, stop: StopRequest, saver: Saver) -> None:
        self._tuning, self._topology, self._stop, self._saver = tuning, topology, stop, saver
        self._saved_at = time.monotonic()

    def next_action(self, microbatch: Microbatch) -> NextAction:
        """Returns the action after `microbatch`. All ranks of the first stage call it; elsewhere the result is always
        NEXT.
        """
        if not microbatch.is_last or not self._topology.is_first_stage:
            return NextAction.NEXT
        # the run is about to end anyway, so a request to stop changes nothing
        if microbatch.step == self._tuning.train_iters:
            return NextAction.END if microbatch.ends_step else NextAction.NEXT
        saves = (
            microbatch.ends_step and microbatch.step > 0 and (self._is_due(microbatch.step) or self._minutes_passed())
        )
        if saves:
            self._saver.wait()  # waits first: if the former checkpoint failed, the run must end
        ends = self._stop.is_requested or self._saver.has_failed
        return self._agreed(NextAction.END if ends else NextAction.SAVE if saves else NextAction.NEXT)

    def mark_saved(self) -> None:
        """Records that a checkpoint was just saved."""
        self._saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        interval = self._tuning.save_interval
        return bool(interval) and step % interval == 0

    def _minutes_passed(self) -> bool:
        minutes = self._tuning.save_minutes
        return bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes

    def _agreed(self, action: NextAction) -> NextAction:
        if self._topology.tp * self._topology.dp == 1:
            return action
        agreed = torch.tensor([int(action)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._topology.stage_control)
        return NextAction(int(agreed.item()))
