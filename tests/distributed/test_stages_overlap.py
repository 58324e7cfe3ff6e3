"""The Tuner's whole loop, with its metrics, validations, checkpoints and stop agreements, lets every stage be at work
at once.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from meeting import LONG, SHORT, Meeting
from tuning_jobs import configure, make_tuner
from working_time import DrainingWork
from world import World

from ee_tuning.config import Config, replace
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.tuning import tuner as tuner_module
from ee_tuning.tuning.exit_trainer import ExitTrainer
from ee_tuning.tuning.saving import Saver

# An exit on every layer, so that every stage has losses and an optimizer; 2 micro-batches a step, and 3 in each of 4
# validations.
JOB: dict[str, Any] = {
    "pp": 4,
    "exits": (1, 2, 3, 4, 5, 6),
    "train_iters": 12,
    "global_batch_size": 2,
    "eval_interval": 4,
    "save_interval": 4,
}
NUM_MICROBATCHES = 12 * 2 + 4 * 3


def all_met(config: Config, folder: Path, patience: float, fault: str) -> bool:
    """Whether this stage saw all others at work whenever it ran a micro-batch through its layers."""
    with mock.patch.object(tuner_module, "ExitTrainer", DrainingWork if fault == "drains" else ExitTrainer):
        tuner = make_tuner(config)
    meeting = Meeting(folder, tuner.topology.stage, tuner.topology.pp, NUM_MICROBATCHES, patience)
    with (
        mock.patch.object(TeacherChannel, "num_ahead", 0) if fault == "waits" else nullcontext(),
        mock.patch.object(tuner._model, "run_layers", meeting.at_work(tuner._model.run_layers)),
        mock.patch.object(Saver, "_write_own", meeting.goes_on_meanwhile(Saver._write_own)),
    ):
        tuner.run()
    assert meeting.num_done == NUM_MICROBATCHES
    return meeting.all_met


def run(world: World, folder: Path, config: Config, patience: float = LONG, fault: str = "") -> list[bool]:
    (meetings := folder / "meetings").mkdir(parents=True)
    return world.run(all_met, replace(config, tuning={"run_folder": str(folder / "run")}), meetings, patience, fault)


def test_all_stages_of_a_run_work_at_once(world: World, model: Path, tmp_path: Path) -> None:
    """A rank that waits for another one's metrics, a validation, a checkpoint or a stop agreement that drains the
    relay.
    """
    config = configure(model, tmp_path, **JOB)
    assert all(run(world, tmp_path / "healthy", config))
    # The first stage, when it is late, finds that the others waited no longer.
    assert not any(run(world, tmp_path / "drains", config, SHORT, "drains")[1:])
    assert not any(run(world, tmp_path / "saves itself", replace(config, tuning={"async_save": False}), SHORT)[1:])


def test_no_stage_waits_for_its_lessons(world: World, model: Path, tmp_path: Path) -> None:
    """A backbone that does not run ahead of exits that learn from the final head."""
    config = configure(model, tmp_path, **JOB, loss=("forward_kl",))
    assert all(run(world, tmp_path / "healthy", config))
    assert not any(run(world, tmp_path / "waits", config, SHORT, "waits")[1:])
