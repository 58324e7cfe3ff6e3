"""Checkpoints of a run: when one may be written, what stops a run, and that a resumed one is the run never stopped."""

import os
import pickle
import resource
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from refusals import Hostile
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_tuner, records, tune
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.parallel.relay import NextAction
from ee_tuning.storage.manifest import write_manifest
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.save_stop_policy import SaveStopPolicy
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.stage_forward import StageForward, StageOutput


def tune_with_a_slow_disk(config: Config, seconds: float) -> list[bool]:
    """Nothing is written before the next step has ended, or `seconds` have passed. Whether it had, for each checkpoint
    but the last.
    """
    tuner, write, seen = make_tuner(config), Saver._write_own, []

    def write_late(*args: Any) -> Any:
        begun, end = tuner.step, time.monotonic() + seconds
        while tuner.step == begun < NUM_STEPS and time.monotonic() < end:
            time.sleep(0.002)
        if begun < NUM_STEPS:
            seen.append(tuner.step > begun)
        return write(*args)

    with mock.patch.object(Saver, "_write_own", write_late):
        assert tuner.run()
    return seen


def test_training_goes_on_while_a_checkpoint_is_written_of_what_was_there(
    world: World, model: Path, tmp_path: Path
) -> None:
    """Masters written after a later step's update, or ranks that wait for the disk."""
    beside, waited = (
        configure(model, tmp_path / name, tp=2, pp=2, dtype="float32", save_interval=2) for name in ("beside", "waited")
    )
    waited = job.replace(waited, tuning={"async_save": False})
    assert world.run(tune_with_a_slow_disk, beside, 30.0) == [[True]] * 4
    assert world.run(tune_with_a_slow_disk, waited, 0.1) == [[False]] * 4
    for step in (2, NUM_STEPS):
        got, wanted = checkpoint(beside, step), checkpoint(waited, step)
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(beside) == records(waited)


def tune_by_the_clock(config: Config) -> bool:
    """On one rank of the first stage alone the minutes have passed, at the end of step 2."""
    tuner, passed = make_tuner(config), SaveStopPolicy._minutes_passed

    def once(policy: SaveStopPolicy) -> bool:
        return passed(policy) or (
            tuner.topology.rank == 1 and tuner.step == 1
        )  # it is asked before the step's last micro-batch

    with mock.patch.object(SaveStopPolicy, "_minutes_passed", once):
        return tuner.run()


def test_checkpoints_by_the_clock_are_of_one_step_on_every_rank(world: World, model: Path, tmp_path: Path) -> None:
    """Ranks whose clocks differ, and that save after different steps; a checkpoint that does not set the clock back."""
    config = configure(model, tmp_path / "run", tp=2, pp=2, save_minutes=60.0, eval_interval=0)
    assert world.run(tune_by_the_clock, config) == [True] * 4
    assert saved_steps(config) == [2, NUM_STEPS]
    always = configure(model, tmp_path / "always", save_minutes=1e-9)
    assert tune(always) and saved_steps(always) == [1, 2, 3, 4]


def saved_steps(config: Config) -> list[int]:
    return sorted(int(path.name[5:]) for path in (Path(config.tuning.run_folder) / "checkpoints").glob("step_*"))


def tune_until_signal(config: Config, rank: int = 1) -> tuple[bool, int]:
    """One rank of the first stage gets a signal while the second step is under way, twice as launchers give it."""
    tuner, forward = make_tuner(config), StageForward.forward

    def signalled(stage_forward: StageForward, microbatch: Microbatch, next_action: NextAction) -> StageOutput:
        if microbatch.is_training and microbatch.step == 2 and tuner.topology.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(stage_forward, microbatch, next_action)

    with mock.patch.object(StageForward, "forward", signalled):
        return tuner.run(), tuner.step


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 2)])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(
    world: World, model: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    """Moments, step counts, masters or a data position lost in a checkpoint; stages that disagree where to stop; a
    validation left out.
    """
    whole = configure(model, tmp_path / "whole", tp=tp, pp=pp, dtype="float32")
    parts = configure(model, tmp_path / "parts", tp=tp, pp=pp, dtype="float32")
    assert world.run(tune, whole) == [True] * 4
    assert world.run(tune_until_signal, parts) == [(False, 2)] * 4
    assert world.run(tune, job.replace(parts, tuning={"resume": True})) == [True] * 4
    got, wanted = checkpoint(parts, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(parts) == records(whole)


def test_a_run_resumes_under_another_layout(world: World, model: Path, tmp_path: Path) -> None:
    """Checkpoint tensors that are some layout's shards and not rectangles of whole ones; a validation that comes
    twice.
    """
    config = configure(model, tmp_path / "run", lr_decay_style="constant", lr_warmup_fraction=0.0)
    straight = job.replace(config, tuning={"run_folder": str(tmp_path / "straight")})
    assert tune(job.replace(config, tuning={"train_iters": 2})) and tune(straight)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    assert world.run(tune, job.replace(config, tuning={"resume": True}, parallel=layout)) == [True] * 4
    got, wanted = checkpoint(config, NUM_STEPS), checkpoint(straight, NUM_STEPS)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    came, due = ([(each["kind"], each["step"]) for each in records(run)] for run in (config, straight))
    assert came == due


def test_older_checkpoints_go_and_a_foreign_one_is_refused(model: Path, tmp_path: Path) -> None:
    """A disk filled by old checkpoints; a run that goes on from another run's heads."""
    config = configure(model, tmp_path / "run", keep_checkpoints=2, save_interval=1)
    assert tune(config)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000004"]
    with pytest.raises(InputError, match="must keep its exit_layers"):
        make_tuner(configure(model, tmp_path / "run", exits=(2,))).resume()
    damaged = tmp_path / "run" / "checkpoints" / "step_00000004" / "__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match="is altered"):
        make_tuner(config).resume()


def test_what_a_run_keeps_is_its_own_past(model: Path, tmp_path: Path) -> None:
    """A run that went back to an earlier checkpoint loses it to later ones, which are of the way it has left."""
    config = configure(model, tmp_path / "run", keep_checkpoints=10, save_interval=1)
    assert tune(config)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.write_text("step_00000001\n")
    assert tune(job.replace(config, tuning={"keep_checkpoints": 2, "train_iters": 2}))
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_a_pickle_that_runs_commands_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch unpickles a checkpoint's .metadata without a question; the manifest beside it is no protection from who
    wrote both.
    """
    monkeypatch.chdir(tmp_path)
    config = configure(model, tmp_path / "run", train_iters=1)
    assert tune(config)
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    write_manifest(folder)
    with pytest.raises(InputError, match=r"asks for posix\.system"):
        make_tuner(config).resume()
    assert not (tmp_path / "hostile").exists()


def tune_where_files_end_early(config: Config, num_bytes: int) -> tuple[bool, str]:
    """No file may grow beyond `num_bytes` on the last rank, as on a disk that is full. Whether the run ended well, and
    its complaint.
    """
    tuner = make_tuner(config)
    tuner.resume()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    if tuner.topology.rank == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, former[1]))
    try:
        return tuner.run(), ""
    except InputError as error:
        return False, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before(
    world: World, model: Path, tmp_path: Path
) -> None:
    """A rank that can not write and leaves the others waiting; half a checkpoint that `latest` names."""
    config = configure(model, tmp_path / "run", tp=2, pp=2, dtype="float32", train_iters=2)
    assert world.run(tune, config) == [True] * 4
    more = job.replace(config, tuning={"train_iters": NUM_STEPS})
    for further in (
        more,
        job.replace(more, tuning={"train_iters": 1000, "save_interval": 4}),
    ):  # at the end; and midway, found out later
        results = world.run(tune_where_files_end_early, further, 10_000)
        assert len(set(results)) == 1 and results[0][0] is False
        assert "step_00000004 can not be written: File too large" in results[0][1] and "\n" not in results[0][1]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert world.run(tune, more) == [True] * 4
