"""The same command, given again, goes on; another job is told from it before it spoils a run."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.config import Config, replace, save_config
from ee_tuning.errors import InputError
from ee_tuning.tuning import resume_check
from ee_tuning.tuning.resume_check import CONFIG, check_resumable
from ee_tuning.tuning.state import PROGRESS, TrainingProgress, _read_progress

JOB = replace(Config(), model={"path": "m"}, exits={"exit_layers": (2, 5)}, data={"paths": ("a", "b")})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of JOB."""
    save_config(JOB, tmp_path / CONFIG)
    return tmp_path


def refusal(config: Config, run: Path) -> str:
    """The error that `config` meets in the folder `run`; empty if it may go on there."""
    try:
        check_resumable(config, run)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel": {"tensor_model_parallel_size": 4}},
        {"tuning": {"micro_batch_size": 1, "save_minutes": 5.0, "run_folder": "moved"}},
        {"model": {"path": "moved"}, "generation": {"threshold": 0.3}},
    ],
)
def test_layout_and_watching_may_change(run: Path, changes: dict[str, Any]) -> None:
    """A run that can not go on on fewer machines."""
    assert refusal(replace(JOB, **changes), run) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuning": {"lr": 1e-3}}, ["tuning.lr (0.0001 there, 0.001 here)"]),
        ({"tuning": {"backbone_weights": "nf4"}}, ["tuning.backbone_weights (native there, nf4 here)"]),
        (
            {"tuning": {"loss": ("forward_kl",), "train_iters": 7}},
            ["tuning.loss (cross_entropy there, forward_kl here)", "tuning.train_iters"],
        ),
        ({"data": {"paths": ("a",)}}, ["data.paths (a,b there, a here)"]),
        ({"exits": {"path": "elsewhere"}}, ["exits.path"]),
    ],
)
def test_what_changes_the_outcome_is_named(run: Path, changes: dict[str, Any], words: list[str]) -> None:
    """A run that goes on with another learning rate, unasked and unseen."""
    told = refusal(replace(JOB, **changes), run)
    assert all(word in told for word in (*words, "--allow-config-change")) and len(told) < 500
    allowed = {**changes, "tuning": {**changes.get("tuning", {}), "allow_config_change": True}}
    assert refusal(replace(JOB, **allowed), run) == ""


def test_the_keys_that_are_free_exist() -> None:
    """A key that was renamed, and is no longer free."""
    known = {f"{section.name}.{key.name}" for section in fields(Config) for key in fields(getattr(JOB, section.name))}
    assert known >= resume_check._FREE


def test_progress_of_earlier_versions_is_read(tmp_path: Path) -> None:
    """A run that can not go on after an update, or that validates its last step twice."""
    tree = {"step": 3, "position": 24, "fixed": {"seed": 1}}
    (tmp_path / PROGRESS).write_text(json.dumps(tree))
    assert _read_progress(tmp_path, {"seed": 1}) == TrainingProgress(validated_step=3, **tree)
    (tmp_path / PROGRESS).write_text("[]")
    with pytest.raises(InputError, match=r"progress\.json can not be read"):
        _read_progress(tmp_path, {})
