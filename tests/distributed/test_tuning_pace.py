"""The Tuner's whole loop, with its metrics, validations and stop agreements, keeps every stage busy."""
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tuning_jobs import configure, make_tuner
from world import World

from ee_tuning.config import Config
from ee_tuning.tuning import exit_work
from ee_tuning.tuning import tuner as tuner_module
from ee_tuning.tuning.exit_work import ExitWork
from ee_tuning.tuning.step import StageWalk

SECONDS = 0.02
"""Of the layers of a micro-batch, and of its losses: alike on every stage, so that none has to wait for a slower one."""


class Clock:
    """This rank's working time, from its first work to its last."""

    def __init__(self) -> None:
        self.busy = self.ended = 0.0
        self.began: float | None = None

    def timed(self, work: Callable[..., Any], at_least: float) -> Callable[..., Any]:
        def padded(*args: Any) -> Any:
            began = time.perf_counter()
            result = work(*args)
            time.sleep(max(at_least - (time.perf_counter() - began), 0.0))
            self.began, self.ended = began if self.began is None else self.began, time.perf_counter()
            self.busy += self.ended - began
            return result
        return padded


class DrainingWork(ExitWork):
    """Lets every stage wait for the last one at the end of a step."""

    def end_step(self, *args: Any) -> None:
        super().end_step(*args)
        self._topology.barrier()


def idle_share(config: Config, drains: bool) -> float:
    with mock.patch.object(tuner_module, "ExitWork", DrainingWork if drains else ExitWork):
        tuner, clock = make_tuner(config), Clock()
    with (mock.patch.object(tuner._model, "run_layers", clock.timed(tuner._model.run_layers, SECONDS)),
          mock.patch.object(StageWalk, "train", clock.timed(StageWalk.train, SECONDS)),
          mock.patch.object(StageWalk, "evaluate", clock.timed(StageWalk.evaluate, SECONDS)),
          mock.patch.object(exit_work, "update_exits", clock.timed(exit_work.update_exits, 0.0)),
          mock.patch.object(tuner_module, "save_checkpoint")):
        tuner.run()
    assert clock.began is not None
    return 1 - clock.busy / (clock.ended - clock.began)


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_no_stage_of_a_run_idles_where_draining_costs_a_third(world: World, model: Path, tmp_path: Path, loss: str) -> None:
    """A rank that waits for another one's metrics, a validation or a stop agreement that drains the relay; a backbone that waits for its
    exits' lessons."""
    # An exit on every layer, so that every stage has losses and an optimizer; 2 micro-batches a step.
    config = configure(model, tmp_path / "run", pp=4, exits=(1, 2, 3, 4, 5, 6), train_iters=18, global_batch_size=2, eval_interval=6,
                       loss=(loss,))
    if loss == "cross_entropy":  # a backbone that runs ahead has work left while its exits wait
        drained = world.run(idle_share, config, True)
        assert min(drained) > 0.25, drained
    # Up to five runs: a machine that has far more to do than processors delays every wake-up.
    shares: list[list[float]] = []
    while len(shares) < 5 and not any(max(each) < 0.10 for each in shares):
        shares.append(world.run(idle_share, config, False))
    assert max(shares[-1]) < 0.10, shares
