"""What the exits of a stage do with the micro-batches that passed it: train or validate, and at the end of either tell
the metrics.
"""

from collections import Counter

from ee_tuning.config import TuningSection
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.averages import Divisor, Sums, training_figures, validation_figures
from ee_tuning.tuning.metrics import MetricsBoard
from ee_tuning.tuning.optimizer import ExitOptimizer, update_exits
from ee_tuning.tuning.pace import Pace
from ee_tuning.tuning.schedule import learning_rate, loss_weight_ramp
from ee_tuning.tuning.step import Passed, StageWalk


class ExitWork:
    """The exits of this stage. `step` counts the optimizer steps taken."""

    def __init__(self, exits: list[ExitOptimizer], tuning: TuningSection, topology: Topology, step: int = 0) -> None:
        self.exits, self.step = exits, step
        self._tuning, self._topology, self._sums = tuning, topology, Sums()
        self._trained = [each for each in exits if each.trains]
        self._divisor: Divisor = "weights" if tuning.divide_by_token_weights else "tokens"
        self._skipped: Counter[int] = Counter()

    def do(self, passed: Passed, walk: StageWalk, metrics: MetricsBoard, pace: Pace) -> None:
        """The micro-batches of a run, in order. All ranks of the stage do the same one together."""
        teacher, leg = walk.lesson(passed), passed.leg
        self._sums.add(
            walk.train(passed, teacher, self._trained) if leg.trains else walk.evaluate(passed, teacher, self.exits)
        )
        if leg.is_last and leg.trains:
            self.end_step(passed, metrics, pace)
        elif leg.is_last:
            self.end_validation(passed, metrics)

    def end_step(self, passed: Passed, metrics: MetricsBoard, pace: Pace) -> None:
        """Updates every exit, and posts a record where one is due."""
        tuning, sums, self.step = self._tuning, self._take_sums(), passed.leg.step
        lr, ramp = learning_rate(self.step, tuning), loss_weight_ramp(self.step, tuning)
        with hang_watchdog(self._topology, f"the update of step {self.step} (all ranks of its stage take part)"):
            updates = (
                update_exits(self._trained, sums, self._divisor, lr, ramp, self._topology) if self._trained else {}
            )
        self._skipped.update(layer for layer, update in updates.items() if update.is_skipped)
        pace.count_step()
        if (
            self.step % tuning.log_interval
            and passed.next_action is not NextAction.END
            and self.step != tuning.train_iters
        ):
            return
        pace.lap(trained=True)
        own, stage = pace.report(), str(self._topology.stage)
        metrics.post(
            {
                "kind": "train",
                "step": self.step,
                "lr": lr,
                **training_figures({layer: update.means for layer, update in updates.items()}, tuning.distils),
                "grad_norm": {str(layer): update.grad_norm for layer, update in updates.items()},
                "skipped": {str(layer): count for layer, count in self._skipped.items()},
                "tokens_per_second": own["tokens_per_second"],
                "flops_per_second": own["flops_per_second"],
                "idle_share": {stage: own["idle_share"]},
                "memory_bytes": {stage: own["memory_bytes"]},
            }
        )
        self._skipped.clear()

    def end_validation(self, passed: Passed, metrics: MetricsBoard) -> None:
        """Posts a record of every exit."""
        for each in self.exits:
            each.reshard()
        means = self._take_sums().means(self._topology, self._divisor)
        metrics.post(
            {"kind": "validation", "step": passed.leg.step, **validation_figures(means, self._tuning.wants_final_head)}
        )

    def _take_sums(self) -> Sums:
        sums, self._sums = self._sums, Sums()
        return sums
