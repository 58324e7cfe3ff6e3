"""`ee-tuning verify` finds damage in whatever this project wrote; `--no-verify` does not look for it."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from random_models import random_llama

from ee_tuning import cli
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.flags import FLAGS
from ee_tuning.storage.manifest import write_manifest

pytestmark = pytest.mark.slow


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    random_llama(tmp_path / "model")
    output = tmp_path / "run" / "exit_heads"
    assert (
        cli.main(["convert", "--model", str(tmp_path / "model"), "--exit-layers", "2,4", "--output", str(output)]) == 0
    )
    return output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_each_file_has_its_line(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file passed over would be taken for whole."""
    (artifact / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert cli.main(["verify", str(artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = set(json.loads((artifact / "manifest.json").read_text())["files"])
    assert {line.split("  ")[0] for line in lines if "whole" in line} == {str(artifact / name) for name in names}
    assert [line for line in lines if "whole" not in line] == [
        f"{artifact / 'notes.txt'}  not in the manifest, not checked"
    ]


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing"])
def test_damage_is_named_and_ends_with_code_2(artifact: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """safetensors, torch and JSON each pass some damage over in silence."""
    path = artifact / "exit_heads.safetensors"
    if damage == "flipped":
        flip(path)
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert cli.main(["verify", str(artifact)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_a_run_folder_is_checked_with_all_that_is_in_it(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoints of a run are what a resumed run stands on."""
    step = artifact.parent / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step / "__0_0.distcp").write_bytes(b"weights")
    write_manifest(step)
    assert cli.main(["verify", str(artifact.parent)]) == 0
    assert {str(artifact / "exit_config.json"), str(step / "__0_0.distcp")} <= {
        line.split("  ")[0] for line in capsys.readouterr().out.splitlines()
    }
    flip(step / "__0_0.distcp")
    assert cli.main(["verify", str(artifact.parent)]) == 2
    assert str(step / "__0_0.distcp") in capsys.readouterr().err


def test_what_has_no_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a folder in which nothing was checked."""
    for folder in (tmp_path, tmp_path / "missing"):
        assert cli.main(["verify", str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err


def test_unverified_exits_are_read_as_they_are(artifact: Path) -> None:
    """--no-verify that verifies anyway spares nobody the hour; what the heads are is checked all the same."""
    whole = ExitHeadsReader(artifact).full("exits.4.output.weight").clone()  # a view of the mapped file otherwise
    flip(artifact / "exit_heads.safetensors")
    altered = ExitHeadsReader(artifact, verifies=False).full("exits.4.output.weight")
    assert altered.shape == whole.shape and not torch.equal(altered, whole)


def test_an_exported_model_is_checked_where_it_is_used(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest beside the weights that nobody looks at; a folder whose manifest.json is another program's,
    refused.
    """
    plain = tmp_path / "plain"
    assert cli.main(["export", "--format", "hf", "--model", str(tmp_path / "model"), "--output", str(plain)]) == 0
    convert = ["convert", "--model", str(plain), "--exit-layers", "2", "--output"]
    assert cli.main([*convert, str(tmp_path / "one")]) == 0
    flip(plain / "model.safetensors")
    assert cli.main([*convert, str(tmp_path / "two")]) == 2
    assert f"{plain / 'model.safetensors'} is altered" in capsys.readouterr().err and not (tmp_path / "two").exists()
    assert cli.main([*convert, str(tmp_path / "two"), "--no-verify"]) == 0
    (plain / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    assert cli.main([*convert, str(tmp_path / "three")]) == 0


@pytest.mark.parametrize("source", ["hf", "megatron"])
@pytest.mark.parametrize("target", ["hf", "megatron"])
def test_what_is_exported_from_an_altered_model_is_never_put_in_place(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str
) -> None:
    """Files are compared with the manifest while they are copied: an output that appears before the comparison ends, or
    without it; a file with weights that the manifest, and so nobody, vouches for.
    """
    model, output = tmp_path / source, tmp_path / "output"
    assert cli.main(["export", "--format", source, "--model", str(tmp_path / "model"), "--output", str(model)]) == 0
    export = ["export", "--format", target, "--model", str(model), "--output", str(output)]
    file = next(model.glob("*.distcp" if source == "megatron" else "*.safetensors"))
    whole = file.read_bytes()
    middle = len(whole) // 2  # far from what describes the tensors
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert cli.main(export) == 2
    assert (
        f"{file} is altered" in capsys.readouterr().err
        and not output.exists()
        and not list(tmp_path.glob("*.partial-*"))
    )
    file.write_bytes(whole)
    manifest = json.loads((model / "manifest.json").read_text())
    del manifest["files"][file.name]
    (model / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(export) == 2
    assert f"does not list {file.name}" in capsys.readouterr().err and not output.exists()


STRANGERS = (
    {"name": "a web page", "icons": []},
    {"files": ["a.js"]},
    {"files": {"main.js": "static/main.js"}},
    {"files": None},
    [1],
)


@pytest.mark.parametrize("content", STRANGERS)
def test_another_program_s_manifest_stands_in_nobody_s_way(
    artifact: Path, tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound model refused for a file of that name; a model passed over for a folder within it that has one."""
    model = tmp_path / "model"
    (model / "manifest.json").write_text(json.dumps(content))
    shutil.copytree(artifact, model / "exits")
    (model / "web").mkdir()
    (model / "web" / "manifest.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert cli.main(["verify", str(model)]) == 0
    told = capsys.readouterr().out
    assert (
        f"{model / 'model.safetensors'}  header and sizes sound" in told
        and f"{model / 'exits' / 'exit_config.json'}  whole" in told
    )
    assert cli.main(["export", "--format", "hf", "--model", str(model), "--output", str(tmp_path / "export")]) == 0
    flip(model / "exits" / "exit_heads.safetensors")
    assert cli.main(["verify", str(model)]) == 2


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_an_export_with_exits_is_inspected_as_a_model(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A Megatron checkpoint that is taken for an artifact without its weights, for its exit_config.json."""
    export = tmp_path / kind
    assert (
        cli.main(
            [
                "export",
                "--format",
                kind,
                "--model",
                str(tmp_path / "model"),
                "--exits",
                str(artifact),
                "--output",
                str(export),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert cli.main(["inspect", str(export), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["shape"]["num_layers"]) == ("model", 6)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_exports_are_readable_as_the_umask_says(artifact: Path, tmp_path: Path, kind: str) -> None:
    """Modes of 0600, as safetensors' own writer leaves them: a model that a team's other members can not load."""
    old = os.umask(0o027)
    try:
        assert (
            cli.main(
                [
                    "export",
                    "--format",
                    kind,
                    "--model",
                    str(tmp_path / "model"),
                    "--exits",
                    str(artifact),
                    "--output",
                    str(tmp_path / kind),
                ]
            )
            == 0
        )
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / kind).stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / kind).iterdir()} == {0o640}


def test_commands_that_read_weights_take_no_verify() -> None:
    """The flag on one command and not on another; a flag that means the opposite of its name."""
    for command, flags in FLAGS.items():
        if command == "advise":  # reads a model's shape only
            continue
        assert ("--no-verify" in flags) == ("--model" in flags)
        if "--no-verify" in flags:
            needed = {
                "export": ["--format", "artifact", "--output", "o"],
                "convert": ["--output", "o"],
                "regenerate": ["--output", "o"],
                "evaluate": ["--output", "o"],
                "prune": ["--drop", "auto:1"],
                "compare": ["--tokens", "1", "--output", "o"],
            }.get(command, [])
            assert cli.parse([command, *needed, "--no-verify"]).overrides["exits.verify"] is False
