"""The command `convert`: the same bytes every time, and nothing half-written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from random_models import random_llama
from refusals import refusal

from ee_tuning import config as job
from ee_tuning.artifact.convert import convert, model_name
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.artifact.inspect import artifact_facts, inspect_path, model_facts
from ee_tuning.config import Config
from ee_tuning.storage import shared_folder
from ee_tuning.storage.hashed_file import HashedFile
from ee_tuning.storage.safetensors_layout import SafetensorsLayout


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    random_llama(folder)
    return folder


def conversion(llama: Path, **section: Any) -> Config:
    return job.replace(Config(), model={"path": str(llama)}, exits={"exit_layers": (2, 4), **section})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("init", ["copy", "random"])
def test_two_conversions_give_the_same_bytes(llama: Path, tmp_path: Path, init: str) -> None:
    """A date or a random name inside would make every artifact another."""
    convert(conversion(llama, init=init), tmp_path / "a")
    convert(conversion(llama, init=init), tmp_path / "deeper" / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "deeper" / "b")


def test_the_summary_says_what_to_type_next(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with a space would break the command that is proposed."""
    convert(conversion(llama), tmp_path / "my exits")
    printed = capsys.readouterr().out
    assert (
        f"ee-tuning tune --model {llama} --exits '{tmp_path / 'my exits'}'" in printed
        and "layers 2, 4 of small-llama" in printed
    )


def test_a_conversion_that_fails_midway_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an artifact in place would be loaded, or would stand in the way of the next attempt."""
    write, blocks = HashedFile.write, []

    def fails_at_the_third(self: HashedFile, data: Any) -> int:
        blocks.append(data)
        if len(blocks) == 3:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(HashedFile, "write", fails_at_the_third)
    message = refusal(lambda: convert(conversion(llama), tmp_path / "exits"))
    assert str(tmp_path / "exits") in message and "No space left" in message
    assert len(blocks) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["after every tensor", "before the rename"])
def test_what_a_killed_conversion_leaves_does_not_load(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """SIGKILL runs no clean-up. Up to its very last step the folder must be no artifact, and never under its final
    name.
    """
    seen: list[Path] = []
    owner, name = {
        "after every tensor": (SafetensorsLayout, "write_index"),
        "before the rename": (shared_folder, "write_manifest"),
    }[moment]
    step = getattr(owner, name)

    def copied_before(*arguments: Any) -> None:
        (partial,) = (argument for argument in arguments if isinstance(argument, Path))
        seen.append(Path(shutil.copytree(partial, tmp_path / "killed")))
        step(*arguments)

    monkeypatch.setattr(owner, name, copied_before)
    convert(conversion(llama), tmp_path / "exits")
    assert (seen[0] / "exit_heads.safetensors").is_file()
    refusal(lambda: ExitHeadsReader(seen[0]))


def test_an_existing_output_is_replaced_only_where_asked_and_only_an_artifact(llama: Path, tmp_path: Path) -> None:
    """--overwrite with a mistyped folder must not remove somebody's work."""
    output = tmp_path / "exits"
    convert(conversion(llama), output)
    before = contents(output)
    assert "--overwrite" in refusal(lambda: convert(conversion(llama, init="random"), output))
    assert contents(output) == before
    convert(conversion(llama, init="random"), output, overwrite=True)
    assert contents(output) != before and sorted(path.name for path in tmp_path.iterdir()) == ["exits"]

    (output / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(lambda: convert(conversion(llama), output, overwrite=True))
    refusal(lambda: convert(conversion(llama), llama, overwrite=True))
    assert (output / "notes.txt").read_text() == "mine" and (llama / "config.json").is_file()


def test_a_failed_replacement_keeps_the_old_artifact(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite that removes first and writes then would lose tuned heads to a full disk."""
    output = tmp_path / "exits"
    convert(conversion(llama), output)
    before = contents(output)

    def fails(self: HashedFile, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", fails)
    refusal(lambda: convert(conversion(llama, init="random"), output, overwrite=True))
    assert contents(output) == before and [path.name for path in tmp_path.iterdir()] == ["exits"]


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"exit_layers": (2, 7)}, "1..6"),
        ({"exit_layers": (4, 2)}, "2,4"),
        ({"exit_layers": ()}, "exit_layers"),
        ({"architecture": "embedding", "output": "tied"}, "exits.output must be untied"),
    ],
)
def test_exits_that_can_not_be_are_refused_before_anything_is_made(
    llama: Path, tmp_path: Path, section: dict[str, Any], named: str
) -> None:
    """A head after a layer that does not exist would be written and fail only when it is loaded."""
    assert named in refusal(lambda: convert(conversion(llama, **section), tmp_path / "exits"))
    assert not list(tmp_path.iterdir())


def test_a_layout_that_does_not_divide_the_model_is_refused(llama: Path, tmp_path: Path) -> None:
    """Tuning would refuse it later, after the artifact was made for nothing."""
    config = job.replace(conversion(llama), parallel={"tensor_model_parallel_size": 3})
    assert "num_attention_heads" in refusal(lambda: convert(config, tmp_path / "exits"))


def test_an_output_that_can_not_be_made_is_named(llama: Path, tmp_path: Path) -> None:
    """A file where a folder should be is the user's mistake, not a traceback."""
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(lambda: convert(conversion(llama), tmp_path / "file" / "exits"))


def test_a_snapshot_of_hugging_face_s_cache_has_its_repository_s_name(tmp_path: Path) -> None:
    """The folder's own name is a commit's hash, which tells people nothing."""
    assert model_name(tmp_path / "models--org--some-model" / "snapshots" / "0123abc") == "org/some-model"
    assert model_name(tmp_path / "plain") == "plain"


def test_inspect_counts_what_is_there(llama: Path, tmp_path: Path) -> None:
    """Sizes that are computed and not those of the files would plan for another model."""
    convert(conversion(llama), tmp_path / "exits")
    model, exits = model_facts(llama), artifact_facts(tmp_path / "exits")
    assert exits["bound_to"]["fingerprint"] == model["fingerprint"]
    header = 16_384
    assert 0 < (llama / "model.safetensors").stat().st_size - model["bytes"] < header
    assert model["parameters"]["all"] * 4 == model["bytes"]
    assert 2 * model["one_exit_head_bytes"]["mlp, untied"] == 4 * exits["parameters"]["all"]
    assert 0 < exits["bytes"] - 4 * exits["parameters"]["all"] < header


def test_inspect_refuses_what_is_neither(tmp_path: Path) -> None:
    """An empty answer would look like an empty model."""
    assert "neither" in refusal(lambda: inspect_path(tmp_path, as_json=False))
    assert "there is no folder" in refusal(lambda: inspect_path(tmp_path / "nowhere", as_json=True))
