"""Distillation through the relay: whatever the layout, the lessons are those of one process, and checkpoints are of
whole steps.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resuming import tune_until_signal
from test_tuning import assert_same_records
from tuning_jobs import NUM_STEPS, checkpoint, configure, records, tune
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config

MIXTURES: dict[str, dict[str, Any]] = {
    "top_k": {"loss": ("cross_entropy=0.3", "forward_kl=0.7"), "teacher_top_k": 7},
    "hidden": {
        "loss": ("forward_kl", "total_variation=0.5"),
        "teacher": "hidden",
        "token_weights": "confidence",
        "divide_by_token_weights": True,
    },
    "compared": {"compare_final": True, "token_weights": "confidence"},
}
LAYOUTS = {
    "top_k": [(1, 4, False, 0), (2, 2, True, 0), (2, 2, True, 4)],
    "hidden": [(1, 4, False, 0), (2, 2, True, 0), (2, 1, False, 0), (1, 4, False, 3)],
    "compared": [(1, 4, False, 0)],
}
"""TP, PP, whether the sequence is cut over TP, and the tokens of its chunks."""


@pytest.fixture(scope="module", params=list(MIXTURES))
def alone(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Config]:
    """A run in one process."""
    config = configure(
        model, tmp_path_factory.mktemp(request.param) / "run", save_interval=2, **MIXTURES[request.param]
    )
    assert tune(config)
    return request.param, config


def test_every_layout_learns_the_lessons_of_one_process(
    world: World, model: Path, alone: tuple[str, Config], tmp_path: Path
) -> None:
    """A lesson of another micro-batch, or of a part of the sequence, an update before its step is whole, a backbone
    that runs past a checkpoint.
    """
    mixture, wanted = alone
    for tp, pp, cuts_sequence, chunk in LAYOUTS[mixture]:
        run = tmp_path / f"run{tp}{pp}{chunk}"
        config = configure(model, run, tp=tp, pp=pp, save_interval=2, **MIXTURES[mixture])
        keys = {"forward_chunk_length": chunk}
        config = job.replace(config, parallel={"sequence_parallel": cuts_sequence}, tuning=keys)
        assert world.run(tune, config) == [True] * 4
        assert_same_records(records(config), records(wanted))
        validation = records(config)[0]
        assert validation["acceptance"].keys() == validation["agreement"].keys() == {"2", "5"}
        for step in (2, NUM_STEPS):
            got, expected = checkpoint(config, step), checkpoint(wanted, step)
            assert got.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_a_run_that_distils_goes_on_to_the_same_bits_after_a_signal(world: World, model: Path, tmp_path: Path) -> None:
    """Micro-batches whose lesson had not arrived when the run stopped, left out or read twice."""
    settings = {
        "pp": 4,
        "dtype": "float32",
        "global_batch_size": 2,
        "loss": ("cross_entropy", "forward_kl"),
        "exits": (1, 2, 3, 4, 5, 6),
    }
    whole, parts = (configure(model, tmp_path / name, **settings) for name in ("whole", "parts"))
    assert world.run(tune, whole) == [True] * 4
    assert world.run(tune_until_signal, parts, 0) == [(False, 2)] * 4
    assert world.run(tune, job.replace(parts, tuning={"resume": True})) == [True] * 4
    got, wanted = checkpoint(parts, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(parts) == records(whole)


def test_a_checkpoint_of_a_run_that_distils_is_taken_while_later_steps_are_under_way(
    world: World, model: Path, tmp_path: Path
) -> None:
    """The data position of the backbone, which is ahead, in place of the exits'; a checkpoint that waits for the
    lessons of later steps.
    """
    settings = {
        "pp": 4,
        "dtype": "float32",
        "global_batch_size": 2,
        "loss": ("forward_kl",),
        "exits": (1, 4, 6),
        "train_iters": 8,
    }
    whole, parts = (configure(model, tmp_path / name, save_interval=3, **settings) for name in ("whole", "parts"))
    assert world.run(tune, whole) == [True] * 4
    assert (
        json.loads((tmp_path / "whole" / "checkpoints" / "step_00000003" / "progress.json").read_text())["position"]
        == 6
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "latest").write_text("step_00000003\n")
    assert world.run(tune, job.replace(parts, tuning={"resume": True})) == [True] * 4
    got, wanted = checkpoint(parts, 8), checkpoint(whole, 8)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(parts) == records(whole)
