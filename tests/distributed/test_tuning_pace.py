"""The Tuner's whole loop, with its metrics, validations and stop agreements, keeps every stage busy."""
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from tuning_jobs import configure, make_tuner
from working_time import Clock, DrainingWork
from world import World

from ee_tuning.config import Config
from ee_tuning.tuning import exit_work
from ee_tuning.tuning import tuner as tuner_module
from ee_tuning.tuning.exit_work import ExitWork
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.step import StageWalk
from ee_tuning.tuning.tutor import Tutor

SECONDS = 0.02
"""Of the layers of a micro-batch, and of its losses: alike on every stage, so that none has to wait for a slower one."""


def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(8 * SECONDS)
        return write(*args)
    return slow


def idle_share(config: Config, fault: str) -> float:
    with mock.patch.object(tuner_module, "ExitWork", DrainingWork if fault == "drains" else ExitWork):
        tuner, clock = make_tuner(config), Clock()
    with (mock.patch.object(Tutor, "num_ahead", 0) if fault == "waits" else nullcontext(),
          mock.patch.object(tuner._model, "run_layers", clock.timed(tuner._model.run_layers, SECONDS)),
          mock.patch.object(StageWalk, "train", clock.timed(StageWalk.train, SECONDS)),
          mock.patch.object(StageWalk, "evaluate", clock.timed(StageWalk.evaluate, SECONDS)),
          mock.patch.object(exit_work, "update_exits", clock.timed(exit_work.update_exits)),
          mock.patch.object(Saver, "_write_own", slowly(Saver._write_own))):
        tuner.run()
    return clock.idle_share


# An exit on every layer, so that every stage has losses and an optimizer; 2 micro-batches a step.
JOB: dict[str, Any] = {"pp": 4, "exits": (1, 2, 3, 4, 5, 6), "train_iters": 18, "global_batch_size": 2, "eval_interval": 6,
                       "save_interval": 6}


def test_no_stage_of_a_run_idles_where_draining_costs_a_third(world: World, model: Path, tmp_path: Path) -> None:
    """A rank that waits for another one's metrics, a validation, a checkpoint or a stop agreement that drains the relay."""
    config = configure(model, tmp_path / "run", **JOB)
    drained = world.run(idle_share, config, "drains")
    assert min(drained) > 0.25, drained
    assert_idle_below(0.10, world, config)


def test_no_stage_waits_for_its_lessons_where_that_costs_half(world: World, model: Path, tmp_path: Path) -> None:
    """A backbone that does not run ahead of exits that learn from the final head."""
    config = configure(model, tmp_path / "run", **JOB, loss=("forward_kl",))
    waited = world.run(idle_share, config, "waits")
    assert min(waited[:3]) > 0.4, waited
    assert_idle_below(0.15, world, config)


def assert_idle_below(limit: float, world: World, config: Config) -> None:
    # Up to five runs: a machine that has far more to do than processors delays every wake-up.
    shares: list[list[float]] = []
    while len(shares) < 5 and not any(max(each) < limit for each in shares):
        shares.append(world.run(idle_share, config, ""))
    assert max(shares[-1]) < limit, shares
