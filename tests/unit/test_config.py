"""The job's YAML is strict both ways: what is written is understood, what is not understood is refused by name."""

import math
from pathlib import Path

import pytest

from ee_tuning.config import Config, load_config, replace, save_config
from ee_tuning.errors import InputError
from ee_tuning.flags import FLAGS, config_keys


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_every_value_survives_a_round_trip(tmp_path: Path):
    """A run folder's config.yaml that reads back differently would resume another run."""
    config = replace(
        Config(),
        model={"path": "007", "dtype": "bfloat16"},
        exits={"exit_layers": (3, 6), "path": None, "output": "tied"},
        data={"paths": ("a b.txt", "null", "1e-4")},
        tuning={"lr": 1e-7, "loss_weights": (0.5, 1.0), "resume": True},
        generation={"threshold": (math.inf,), "stop": ("\n\n", "a, b", "é"), "exit_layer": 3},
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    save_config(Config(), tmp_path / "default.yaml")
    assert load_config(tmp_path / "default.yaml") == Config() == load_config(None) == load_config(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tunning:\n  lr: 1\n", ["unknown key tunning", "did you mean tuning?"]),
        ("tuning:\n  learning_rate: 1\n", ["unknown key tuning.learning_rate", "known keys: ", "lr,"]),
        ("tuning:\n  train_iter: 1\n", ["did you mean tuning.train_iters?"]),
        ("tuning:\n  lr: fast\n", ["tuning.lr must be a number", "'fast'"]),
        ("tuning:\n  lr: .nan\n", ["tuning.lr must be a number", "nan"]),
        ("tuning:\n  lr: nan\n", ["tuning.lr must be a number", "nan"]),
        ("tuning:\n  lr: true\n", ["tuning.lr must be a number", "True"]),
        ("tuning:\n  train_iters: 1.5\n", ["tuning.train_iters must be a whole number", "1.5"]),
        ("tuning:\n  train_iters: true\n", ["tuning.train_iters must be a whole number", "True"]),
        ("tuning:\n  train_iters: null\n", ["tuning.train_iters must be a whole number", "None"]),
        ("tuning:\n  resume: 1\n", ["tuning.resume must be true or false", "1"]),
        ("tuning: 3\n", ["tuning must hold keys", "3"]),
        ("model:\n  path: [a]\n", ["model.path must be a text", "['a']"]),
        ("model:\n  dtype: fp8\n", ["model.dtype must be one of float32, bfloat16, float64", "'fp8'"]),
        ("exits:\n  architecture: mpl\n", ["exits.architecture must be one of embedding, norm, linear, mlp", "'mpl'"]),
        ("exits:\n  exit_layers: [3, six]\n", ["exits.exit_layers must be a whole number", "'six'"]),
        ("- a\n", ["must hold sections", "list"]),
        ("a: [\n", ["is not YAML"]),
        ("tuning:\n  lr: 1\n  lr: 2\n", ["lr stands in it twice"]),
        ("tuning:\n  lr: 1\ndata:\ntuning:\n  train_iters: 2\n", ["tuning stands in it twice"]),
        (f"tuning:\n  lr: 1{'0' * 400}\n", ["tuning.lr must be a number that a float can hold", "1329 bits"]),
        (f"tuning:\n  lr: 1{'0' * 9000}\n", ["is not YAML"]),
        ("tuning:\n  lr: 2024-13-45\n", ["is not YAML"]),
        (f"tuning: {'[' * 9000}\n", ["is not YAML", "nested too deeply"]),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, named: list[str]):
    """A key that is silently dropped trains something else than was asked for."""
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    for words in [str(path), *named]:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    """Falling back to the defaults would hide a misspelt file name."""
    with pytest.raises(InputError, match=r"no\.yaml can not be read"):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("tuning.lr", "1e-4", 1e-4),
        ("tuning.lr", "1", 1.0),
        ("tuning.resume", "true", True),
        ("model.dtype", "null", None),
        ("exits.exit_layers", "3, 6,9", (3, 6, 9)),
        ("exits.exit_layers", "[3, 6]", (3, 6)),
        ("exits.exit_layers", "3", (3,)),
        ("exits.exit_layers", ["3", "6"], (3, 6)),
        ("tuning.loss_weights", "1,0.5", (1.0, 0.5)),
        ("generation.exit_layer", "3", 3),
        ("model.path", "007", "007"),
        ("model.path", "on", "on"),
        ("model.path", "2024-01-01", "2024-01-01"),
        ("exits.path", "null", None),
        ("data.paths", "007,on", ("007", "on")),
        ("data.paths", "[a, b]", ("a", "b")),
        ("generation.stop", ["a, b", "3"], ("a, b", "3")),
        ("generation.stop", "\n\n", ("\n\n",)),
    ],
)
def test_overrides_read_what_is_typed(key: str, typed: object, value: object):
    """YAML alone reads a folder called 007 as 7 and one called `on` as true."""
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config(None, {key: typed}), section), name) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("model: {path: 2024_01_15}", "2024_01_15"),
        ("model: {path: 007}", "007"),
        ("model: {path: 0x10}", "0x10"),
        ("model: {path: 12}", "12"),
        ("model: {path: 1:30}", "1:30"),
        ("data: {paths: [010, 1_2]}", ("010", "1_2")),
        ("tuning: {train_iters: 1_000}", 1000),
        ("tuning: {train_iters: -5}", -5),
        ("tuning: {train_iters: 010}", None),
        ("tuning: {train_iters: 1:30}", None),
    ],
)
def test_numbers_in_a_file_are_those_that_are_written(tmp_path: Path, written: str, value: object):
    """YAML 1.1 reads 010 as 8, 1:30 as 90, and a folder called 2024_01_15 as 20240115."""
    section, key = written.split(": {")[0], written.split("{")[1].split(":")[0]
    if value is None:
        with pytest.raises(InputError, match=f"{section}.{key} must be a whole number, got '"):
            load_config(write(tmp_path, written))
    else:
        config = load_config(write(tmp_path, written))
        save_config(config, tmp_path / "again.yaml")
        assert getattr(getattr(config, section), key) == value and load_config(tmp_path / "again.yaml") == config


def test_overrides_lie_over_the_file(tmp_path: Path):
    """A flag that an empty section in the file swallows, or that clears the section's other keys."""
    path = write(tmp_path, "tuning:\n  lr: 1\n  train_iters: 7\ndata:\n")
    config = load_config(path, {"tuning.lr": "2", "data.text_key": "body"})
    assert (config.tuning.lr, config.tuning.train_iters, config.data.text_key) == (2.0, 7, "body")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"threshold": "0.5"}, None),
        ({"measure": "margin"}, None),
        ({"seed": "1"}, "a.json"),
        ({"threshold": "0.5", "calibration": "b.json"}, "b.json"),
    ],
)
def test_a_threshold_that_is_typed_overrules_the_calibration_of_the_file(
    tmp_path: Path, given: dict[str, str], used: str | None
):
    """A flag without an effect, and without a word of it."""
    path = write(tmp_path, "generation: {calibration: a.json}")
    assert (
        load_config(path, {f"generation.{key}": value for key, value in given.items()}).generation.calibration == used
    )


@pytest.mark.parametrize("typed", ["[" * 9000, "1" + "0" * 400, "2024-13-45", "{a: 1, a: 2}"])
def test_an_override_that_makes_no_sense_is_one_line(typed: str):
    """A traceback for a slip of the hand."""
    with pytest.raises(InputError, match=r"tuning\.lr must be a number"):
        load_config(None, {"tuning.lr": typed})


@pytest.mark.parametrize("name", ["tuning", "tuning.no_such", "no_such.lr", "."])
def test_overrides_are_as_strict_as_the_file(name: str):
    """`--set` with a misspelt key must not pass."""
    with pytest.raises(InputError):
        load_config(None, {name: "1"})


def test_every_flag_sets_a_documented_key():
    """A flag of a renamed key would fail only when used, and one without words teaches nothing."""
    keys = config_keys()
    for command, flags in FLAGS.items():
        for flag, key in flags.items():
            assert key in keys, (command, flag)
            assert keys[key].doc, (command, flag)
