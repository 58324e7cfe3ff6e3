"""Keys of new exits are refused where exits are there already, or are of another kind: `tune`, `plan`, `convert`."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.artifact.begun_exits import with_begun_exits
from ee_tuning.artifact.exit_config import CONFIG, ExitHeadsConfig, exit_config_tree
from ee_tuning.artifact.exit_vocab import VOCAB
from ee_tuning.cli import main
from ee_tuning.config import Config, ExitsSection, load_config, save_config
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.tuning.resume_check import CONFIG as RUN_CONFIG
from ee_tuning.tuning.resume_check import check_resumable

HELD = ExitHeadsConfig(
    exit_layers=(2, 5),
    architecture=("mlp", "mlp"),
    output="untied",
    dtype="float32",
    model_name="m",
    model_shape={"vocab_size": 100},
    model_fingerprint="f",
    init="fitted",
    output_vocab={"size": 3, "tokens": 9, "share": 1.0},
    token_ids=(1, 2, 7),
)


@pytest.fixture
def exits(tmp_path: Path) -> Path:
    """The description of an artifact: two exits of a shortlist of three tokens."""
    folder = tmp_path / "exits"
    folder.mkdir()
    (folder / CONFIG).write_text(to_json(exit_config_tree(HELD)))
    (folder / VOCAB).write_text(to_json(list(HELD.token_ids)))
    return folder


def begun(given: dict[str, Any], file: Path | None = None) -> Config:
    return with_begun_exits(load_config(file, given), given)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("exits.exit_layers", "2", ["after layers 2,5"]),
        ("exits.exit_layers", "auto:3", ["after layers 2,5"]),
        ("exits.architecture", ["norm"], ["mlp,mlp"]),
        ("exits.architecture", ["mlp", "norm"], ["mlp,mlp"]),
        ("exits.adapter_rank", "8", ["no adapter"]),
        ("exits.aux_layers", [1, 2, 3], ["no such layers"]),
        ("exits.init", "copy", ["began as fitted"]),
        ("exits.output", "tied", ["untied"]),
        ("exits.output_vocab", "0", ["3 tokens"]),
        ("exits.output_vocab", "50", ["3 tokens", "--widen", "--output-vocab 50"]),
        ("exits.profile_text", "text.py", ["placed already"]),
        ("tuning.fit_tokens", "1000", ["not fitted again"]),
    ],
)
def test_another_head_than_the_artifact_holds_is_refused(exits: Path, key: str, value: Any, words: list[str]) -> None:
    """`--exits X --output-vocab N`, which tuned X's own list and said nothing of it."""
    with pytest.raises(InputError) as caught:
        begun({"exits.path": str(exits), key: value})
    assert all(word in str(caught.value) for word in (key, str(exits), "leave it out", *words)), caught.value


@pytest.mark.parametrize(
    "keys",
    [
        {
            "exits.exit_layers": "2,5",
            "exits.architecture": ["mlp"],
            "exits.output": "untied",
            "exits.output_vocab": "3",
        },
        {"exits.exit_layers": "auto:2", "exits.init": "fitted", "exits.output_vocab": "auto"},
        {"exits.init": "auto", "exits.seed": "7", "exits.verify": "false"},
    ],
)
def test_keys_that_ask_for_what_is_there_are_no_mistake(exits: Path, keys: dict[str, Any]) -> None:
    """The flags of `convert`, repeated for `tune`, refused."""
    assert begun({"exits.path": str(exits), **keys}).exits.path == str(exits)


def test_an_artifact_overrules_the_exits_that_a_job_file_describes(exits: Path, tmp_path: Path) -> None:
    """A job file that makes exits, and whose second stage can not begin with some of them; the config.yaml of an older
    run, given again.
    """
    job = tmp_path / "job.yaml"
    job.write_text("exits: {exit_layers: [2, 5, 8], architecture: norm, output: tied, verify: false}")
    section = begun({"exits.path": str(exits)}, job).exits
    assert (section.exit_layers, section.architecture, section.output, section.verify) == ((), (), "untied", False)
    job.write_text(f"exits: {{path: {exits}, output: tied, init: copy, seed: 5}}")
    assert begun({}, job).exits == ExitsSection(path=str(exits))


def test_a_run_of_an_earlier_version_goes_on(exits: Path, tmp_path: Path) -> None:
    """A run whose config.yaml still has the keys that were without effect, refused as another job."""
    now = begun({"exits.path": str(exits)})
    save_config(dataclasses.replace(now, exits=dataclasses.replace(now.exits, output="tied")), tmp_path / RUN_CONFIG)
    check_resumable(now, tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exits.exit_layers": "2", "exits.adapter_rank": "8"}, ["adapter_rank is for the architecture adapter"]),
        ({"exits.exit_layers": "2", "exits.aux_layers": [1]}, ["aux_layers is for the architecture eagle3"]),
        ({"exits.exit_layers": "2", "exits.init": "copy", "tuning.fit_tokens": "5"}, ["fit_tokens", "init = copy"]),
        ({"tuning.trainable": "lora", "exits.output": "tied"}, ["exits.output", "exit_layers names none"]),
        ({"tuning.trainable": "lora", "tuning.fit_tokens": "5"}, ["fit_tokens", "no exits"]),
    ],
)
def test_keys_of_other_new_exits_are_refused(given: dict[str, Any], words: list[str]) -> None:
    """A rank of heads that have none, and a fit that is not made."""
    with pytest.raises(InputError) as caught:
        begun(given)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "given",
    [
        {"exits.architecture": ["adapter"], "exits.adapter_rank": "8"},
        {"exits.adapter_rank": str(ExitsSection().adapter_rank)},
        {"exits.init": "copy", "tuning.fit_tokens": "0"},
    ],
)
def test_a_default_that_is_given_is_no_mistake(given: dict[str, Any]) -> None:
    """A script that always gives every flag, refused."""
    begun({"exits.exit_layers": "2", **given})


@pytest.mark.parametrize("flags", ["--output-vocab 50", "--architecture norm"])
@pytest.mark.parametrize("command", ["tune --output run --data text", "plan"])
def test_the_commands_refuse(
    exits: Path, tmp_path: Path, command: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A check that a command passes by."""
    assert main([*command.split(), "--model", str(tmp_path), "--exits", str(exits), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert "is for new exits" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", ["--data text.txt", "--fit-tokens 1000", "--init random --seq-length 64"])
def test_convert_refuses_what_only_texts_need(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that a user gives for a fit, and exits that are copied all the same."""
    words = ["convert", "--model", str(tmp_path), "--exit-layers", "2", *flags.split(), "--output", str(tmp_path / "x")]
    assert main(words) == 2
    assert "is for exits that are made from texts" in capsys.readouterr().err
