"""Training and validation of a stage's exits on the micro-batches that went through the stage, and their metrics."""

from collections import Counter

from ee_tuning.config import TuningSection
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.loss_metrics import Divisor, LossSums, training_figures, validation_figures
from ee_tuning.tuning.metrics import MetricsGatherer
from ee_tuning.tuning.optimizer import ExitOptimizer, update_exits
from ee_tuning.tuning.schedule import learning_rate, loss_weight_ramp
from ee_tuning.tuning.stage_forward import StageForward, StageOutput
from ee_tuning.tuning.throughput import Throughput


class ExitTrainer:
    """The exits of this stage. `step` counts the optimizer steps taken; `validated_step` had the last validation."""

    def __init__(self, exits: list[ExitOptimizer], tuning: TuningSection, topology: Topology, step: int = 0) -> None:
        self.exits, self.step = exits, step
        self.validated_step: int | None = None
        self._tuning, self._topology, self._sums = tuning, topology, LossSums()
        self._trained = [each for each in exits if each.trains]
        self._divisor: Divisor = "weights" if tuning.divide_by_token_weights else "tokens"
        self._skipped: Counter[int] = Counter()

    def process(
        self, output: StageOutput, stage_forward: StageForward, metrics: MetricsGatherer, throughput: Throughput
    ) -> None:
        """Trains or validates the exits on one micro-batch. All ranks of the stage process the same micro-batches in
        order.
        """
        teacher, microbatch = stage_forward.teacher_signal(output), output.microbatch
        self._sums.add(
            stage_forward.train(output, teacher, self._trained)
            if microbatch.is_training
            else stage_forward.evaluate(output, teacher, self.exits)
        )
        if microbatch.is_last and microbatch.is_training:
            self.end_step(output, metrics, throughput)
        elif microbatch.is_last:
            self.end_validation(output, metrics)

    def end_step(self, output: StageOutput, metrics: MetricsGatherer, throughput: Throughput) -> None:
        """Updates all exits, and posts a record if one is due."""
        tuning, sums, self.step = self._tuning, self._take_sums(), output.microbatch.step
        lr, ramp = learning_rate(self.step, tuning), loss_weight_ramp(self.step, tuning)
        with hang_watchdog(self._topology, f"the update of step {self.step} (all ranks of its stage take part)"):
            updates = (
                update_exits(self._trained, sums, self._divisor, lr, ramp, self._topology) if self._trained else {}
            )
        self._skipped.update(layer for layer, update in updates.items() if update.is_skipped)
        throughput.count_step()
        if (
            self.step % tuning.log_interval
            and output.next_action is not NextAction.END
            and self.step != tuning.train_iters
        ):
            return
        throughput.mark(trained=True)
        own, stage = throughput.report(), str(self._topology.stage)
        metrics.post(
            {
                "kind": "train",
                "step": self.step,
                "lr": lr,
                **training_figures({layer: update.mean_metrics for layer, update in updates.items()}, tuning.distils),
                "grad_norm": {str(layer): update.grad_norm for layer, update in updates.items()},
                "skipped": {str(layer): count for layer, count in self._skipped.items()},
                "tokens_per_second": own["tokens_per_second"],
                "flops_per_second": own["flops_per_second"],
                "idle_share": {stage: own["idle_share"]},
                "memory_bytes": {stage: own["memory_bytes"]},
            }
        )
        self._skipped.clear()

    def end_validation(self, output: StageOutput, metrics: MetricsGatherer) -> None:
        """Posts the validation record of all exits."""
        for each in self.exits:
            each.reshard()
        self.validated_step = output.microbatch.step
        mean_metrics = self._take_sums().mean_metrics(self._topology, self._divisor)
        metrics.post(
            {
                "kind": "validation",
                "step": self.validated_step,
                **validation_figures(mean_metrics, self._tuning.wants_final_head),
            }
        )

    def _take_sums(self) -> LossSums:
        sums, self._sums = self._sums, LossSums()
        return sums
