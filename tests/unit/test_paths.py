"""Paths of the config: `~`, variables, and commas that are part of a name."""

from pathlib import Path

import pytest

from ee_tuning import cli
from ee_tuning.config import load_config
from ee_tuning.config.paths import expanded, split_paths
from ee_tuning.errors import InputError
from ee_tuning.flags import _METAVARS, FLAGS, config_keys

PATH_KEYS = [name for name, key in config_keys().items() if key.is_path]


def value_of(config: object, name: str) -> object:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def test_every_key_that_is_a_path_is_marked() -> None:
    """A new key whose `~` makes a folder of that name."""
    assert set(PATH_KEYS) == (set(_METAVARS) - {"exits.output_vocab"}) | {"data.cache"}


@pytest.mark.parametrize("name", PATH_KEYS)
def test_paths_are_expanded_however_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder called ~ or $WORK in the working directory, which a shell then expands when it is to be removed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WORK", "/scratch/me")
    (tmp_path / "job.yaml").write_text("{}:\n  {}: {}".format(*name.split("."), "~/x y"))
    (tmp_path / "list.yaml").write_text("{}:\n  {}: {}".format(*name.split("."), "${WORK}/z"))
    uses = (
        (command, f"{flag}=$WORK/a") for command, flags in FLAGS.items() for flag, key in flags.items() if key == name
    )
    command, given = next(uses, ("tune", f"--set={name}=$WORK/a"))
    needed = {
        "convert": ["--output=~/o"],
        "preprocess": ["--output=~/o"],
        "export": ["--output=~/o", "--format=hf"],
        "prune": ["--output=~/o", "--drop=auto:1"],
        "compare": ["--output=~/o", "--tokens=1"],
    }.get(command, [])
    args = cli.parse([command, *needed, given])
    for config, wanted in (
        (load_config(tmp_path / "job.yaml"), f"{tmp_path}/x y"),
        (load_config(tmp_path / "list.yaml"), "/scratch/me/z"),
        (load_config(None, args.overrides), "/scratch/me/a"),
    ):
        assert value_of(config, name) in (wanted, (wanted,))
    assert not needed or args.output == tmp_path / "o"


def test_a_path_that_exists_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a dollar in its name that can no longer be read."""
    monkeypatch.chdir(tmp_path)
    Path("a$HOME").touch()
    Path("~").touch()
    assert [expanded(path, "data.paths") for path in ("a$HOME", "~", "price 5$", "org/name")] == [
        "a$HOME",
        "~",
        "price 5$",
        "org/name",
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NOT_SET/x", "names the variable NOT_SET, which is not set"),
        ("~/x", "home folder, which is not known here; set HOME"),
    ],
)
def test_what_can_not_be_expanded_is_refused(monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    """An output that goes into a folder of a variable's name."""
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setattr(
        "os.path.expanduser", lambda path: path
    )  # as where neither HOME nor an entry of the user is there
    with pytest.raises(InputError, match=rf"tuning\.run_folder = .* {words}"):
        load_config(None, {"tuning.run_folder": path})


def test_commas_of_a_file_that_is_there_are_not_cut_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a comma in its name that is taken for two that are not there."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "a", "b", "c,d.bin", "one, two"):
        Path(name).touch()
    for text, wanted in (
        ("a,b.txt", ["a,b.txt"]),
        ("a,b", ["a", "b"]),
        ("a, b,c", ["a", "b", "c"]),
        ("a,missing", ["a", "missing"]),
        ("c,d", ["c,d"]),
        ("0.3,a,0.7,b", ["0.3", "a", "0.7", "b"]),
        ("one, two", ["one, two"]),
        ("a,", ["a"]),
        (" ", []),
    ):
        assert split_paths(text) == wanted
        for overrides in (cli.parse(["tune", "--data", text]).overrides, {"data.paths": text}):
            assert load_config(None, overrides).data.paths == tuple(wanted)
    assert load_config(None, cli.parse(["tune", "--data", "a,b.txt", "a,b", "b"]).overrides).data.paths == (
        "a,b.txt",
        "a",
        "b",
        "b",
    )
    Path("job.yaml").write_text("data: {paths: ['a,b']}")
    assert load_config("job.yaml").data.paths == ("a,b",), "an item of a list in YAML is one path"
