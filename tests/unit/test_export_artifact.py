"""Exits taken out, put together and added: each keeps its own bytes."""

import json
import shutil
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer
from random_models import random_llama, random_model
from safetensors.torch import load_file

from ee_tuning import cli
from ee_tuning.artifact.exit_heads import ExitHeadsReader, read_exit_config
from ee_tuning.storage.manifest import write_manifest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b`, two models; `a24` (exits 2 and 4, seed 1) and `a5` (exit 5, seed 2) of a, and what can not be put
    together with them.
    """
    folder = tmp_path_factory.mktemp("models")
    random_llama(folder / "a")
    random_llama(folder / "b", seed=1)
    random_model("mixtral", folder / "moe")
    for name, model, layers, *more in (
        ("a24", "a", "2,4", "--seed", "1"),
        ("a5", "a", "5", "--seed", "2"),
        ("a4", "a", "4", "--seed", "3"),
        ("b5", "b", "5"),
        ("norm5", "a", "5", "--architecture", "norm"),
        ("adapter4", "a", "4", "--architecture", "adapter", "--adapter-rank", "8"),
        ("adapter5", "a", "5", "--architecture", "adapter"),
        ("tied5", "a", "5", "--exit-output", "tied"),
        ("moe2", "moe", "2"),
    ):
        assert (
            cli.main(
                [
                    "convert",
                    "--model",
                    str(folder / model),
                    "--exit-layers",
                    layers,
                    "--init",
                    "random",
                    *more,
                    "--output",
                    str(folder / name),
                ]
            )
            == 0
        )
    return folder


def export(models: Path, output: Path, *arguments: str, code: int = 0) -> Path:
    paths = [str(models / word) if (models / word).is_dir() else word for word in arguments]
    assert cli.main(["export", "--format", "artifact", "--output", str(output), *paths]) == code
    return output


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "exit_heads.safetensors").items()}


def of_layers(folder: Path, *layers: int) -> dict[str, bytes]:
    return {name: data for name, data in tensors(folder).items() if int(name.split(".")[1]) in layers}


@pytest.mark.parametrize("choice", [("--only", "4"), ("--drop", "2")])
def test_an_exit_is_taken_out_whole(models, tmp_path, choice):
    """Another layer's head under the right name, or a neighbour left in."""
    taken = export(models, tmp_path / "taken", "--exits", "a24", *choice)
    assert tensors(taken) == of_layers(models / "a24", 4)
    assert read_exit_config(taken).exit_layers == (4,)


def test_two_artifacts_become_one(models, tmp_path):
    """An exit that takes the other artifact's weights; a history that speaks of one of them only."""
    merged = export(models, tmp_path / "merged", "--exits", "a5", "--merge", "a24")
    assert tensors(merged) == {**of_layers(models / "a24", 2, 4), **of_layers(models / "a5", 5)}
    exits = ExitHeadsReader(merged).config
    assert exits.exit_layers == (2, 4, 5)
    assert exits.origins is not None and [exits.origins[layer]["seed"] for layer in ("2", "4", "5")] == [1, 1, 2]
    back = export(models, tmp_path / "back", "--exits", str(merged), "--drop", "5")
    assert read_exit_config(back) == read_exit_config(models / "a24") and tensors(back) == tensors(models / "a24")


def test_exits_of_different_architectures_become_one_artifact(models, tmp_path):
    """An exit that is read as its neighbour's architecture; a word for all where each has its own."""
    merged = export(models, tmp_path / "merged", "--exits", "norm5", "--merge", "a24")
    assert tensors(merged) == {**tensors(models / "a24"), **tensors(models / "norm5")}
    assert read_exit_config(merged).architecture == ("mlp", "mlp", "norm")
    assert json.loads((merged / "exit_config.json").read_text())["architecture"] == ["mlp", "mlp", "norm"]
    back = export(models, tmp_path / "back", "--exits", str(merged), "--only", "5")
    assert read_exit_config(back) == read_exit_config(models / "norm5") and tensors(back) == tensors(models / "norm5")
    more = export(
        models,
        tmp_path / "more",
        "--exits",
        str(merged),
        "--model",
        "a",
        "--add",
        "1,6",
        "--architecture",
        "adapter,layer",
    )
    assert (
        read_exit_config(more).architecture == ("adapter", "mlp", "mlp", "norm", "layer")
        and read_exit_config(more).adapter_rank == 64
    )
    export(models, tmp_path / "untold", "--exits", str(merged), "--model", "a", "--add", "1", code=2)


def test_an_exit_gives_way_to_another_s(models, tmp_path):
    """--drop that also drops what is merged would leave the layer bare."""
    merged = export(models, tmp_path / "merged", "--exits", "a24", "--drop", "4", "--merge", "a4")
    assert tensors(merged) == {**of_layers(models / "a24", 2), **tensors(models / "a4")}


def test_added_exits_are_those_that_convert_makes(models, tmp_path):
    """A second initialization would drift away from the first."""
    added = export(
        models, tmp_path / "added", "--exits", "a24", "--model", "a", "--add", "5", "--init", "random", "--seed", "2"
    )
    assert tensors(added) == {**tensors(models / "a24"), **tensors(models / "a5")}
    copied = export(models, tmp_path / "copied", "--exits", "a24", "--model", "a", "--add", "1,6")
    backbone = load_file(models / "a" / "model.safetensors")
    assert (
        tensors(copied)["exits.6.mlp.up_proj.weight"] == backbone["model.layers.5.mlp.up_proj.weight"].numpy().tobytes()
    )
    assert read_exit_config(copied).exit_layers == (1, 2, 4, 6)


def test_added_exits_come_from_a_model_in_any_format(models, tmp_path, capsys):
    """--add that opens models in a way of its own: another format refused, a manifest's sums passed over."""
    for kind in ("megatron", "hf"):
        folder = tmp_path / kind
        assert cli.main(["export", "--format", kind, "--model", str(models / "a"), "--output", str(folder)]) == 0
        words = ["--exits", "a24", "--model", str(folder), "--add", "5", "--init", "random", "--seed", "2"]
        added = export(models, tmp_path / f"{kind}_added", *words)
        assert tensors(added) == {**tensors(models / "a24"), **tensors(models / "a5")}
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        export(models, tmp_path / f"{kind}_again", *words, code=2)
        assert str(folder / "config.json") in capsys.readouterr().err


def test_one_artifact_s_adapters_have_one_rank(models, tmp_path):
    """A rank that the config alone names: tensors of another shape than the artifact says."""
    words = ["--model", "a", "--add", "1", "--architecture", "adapter"]
    beside = export(models, tmp_path / "beside", "--exits", "a5", "--merge", "adapter4", *words)
    alone = export(models, tmp_path / "alone", "--exits", "adapter4", "--drop", "4", *words, "--adapter-rank", "16")
    assert (read_exit_config(beside).adapter_rank, read_exit_config(alone).adapter_rank) == (8, 16)
    for folder in (beside, alone):
        export(
            models, folder.with_name("copy"), "--exits", str(folder), "--only", "1", "--overwrite"
        )  # which reads all of it


def test_a_model_with_experts_gets_heads_that_it_takes(models):
    """A default that the family refuses: every first try with Mixtral ends in an error."""
    assert read_exit_config(models / "moe2").architecture == ("norm",)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--exits", "a24", "--merge", "b5"], "bound to b"),
        (["--exits", "adapter4", "--merge", "adapter5"], "adapter_rank"),
        (["--exits", "a24", "--merge", "tied5"], "output"),
        (["--exits", "a24", "--merge", "a4"], "after layer 4 comes from two places"),
        (
            ["--exits", "a24", "--drop", "2", "--architecture", "mlp"],
            "exits.architecture is of new exits, and none is asked for",
        ),
        (["--exits", "a24", "--model", "a", "--add", "2"], "after layer 2 comes from two places"),
        (["--exits", "a24", "--model", "b", "--add", "5"], "bound to a"),
        (["--exits", "a24", "--model", "a", "--add", "7"], "1..6"),
        (["--exits", "a24", "--add", "5"], "--model"),
        (["--exits", "adapter4", "--model", "a", "--add", "5", "--adapter-rank", "16"], "--adapter-rank must be 8"),
        (
            [
                "--exits",
                "a24",
                "--merge",
                "adapter5",
                "--model",
                "a",
                "--add",
                "1",
                "--architecture",
                "adapter",
                "--adapter-rank",
                "8",
            ],
            "--adapter-rank must be 64",
        ),
        (["--exits", "moe2", "--model", "moe", "--add", "3", "--architecture", "mlp"], "architecture must not be mlp"),
        (["--exits", "a24", "--model", "a", "--add", "5", "--init", "fitted"], "--merge"),
        (["--exits", "a24", "--drop", "3"], "holds 2, 4, got 3"),
        (["--exits", "a24", "--drop", "2,4"], "at least one exit"),
        (["--exits", "a24", "--drop", "2", "--only", "4"], "one of them"),
        (["--exits", "a24", "--drop", "two"], "layer numbers"),
        (["--exits", "a"], "convert"),
        ([], "--exits"),
    ],
)
def test_what_can_not_be_put_together_is_refused_by_name(models, tmp_path, capsys, arguments, named):
    """Heads of another model decode noise; two heads after one layer can not both be asked."""
    output = export(models, tmp_path / "refused", *arguments, code=2)
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not output.exists() and not list(tmp_path.iterdir())


def test_an_existing_artifact_is_replaced_only_on_demand(models, tmp_path, capsys):
    """A tuned artifact overwritten by its own excerpt is lost."""
    output = export(models, tmp_path / "taken", "--exits", "a24", "--only", "4")
    export(models, output, "--exits", "a24", "--only", "2", code=2)
    assert "--overwrite" in capsys.readouterr().err
    export(models, output, "--exits", "a24", "--only", "2", "--overwrite")
    assert read_exit_config(output).exit_layers == (2,)


def test_an_export_replaces_no_other_thing(models, tmp_path, capsys):
    """Tuned exits, or the model itself, gone by a slip of the hand: whatever has a manifest taken for an export."""
    words = {kind: ["export", "--format", kind, "--model", str(models / "a")] for kind in ("hf", "megatron")}
    exits = Path(shutil.copytree(models / "a24", tmp_path / "exits"))
    checkpoint = tmp_path / "step_00000004"  # of a run
    checkpoint.mkdir()
    for name in (".metadata", "__0_0.distcp", "common.pt"):
        (checkpoint / name).write_text("state")
    write_manifest(checkpoint)
    for kind, word in words.items():
        assert cli.main([*word, "--output", str(tmp_path / kind)]) == 0
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    (tmp_path / "link").symlink_to(exits)
    for kind, other in (("hf", "megatron"), ("megatron", "hf")):
        for output in (tmp_path / other, exits, checkpoint):
            assert cli.main([*words[kind], "--output", str(output), "--overwrite"]) == 2
            assert f"same format only, and {output} is none" in capsys.readouterr().err
        own, again = str(tmp_path / kind), ["export", "--format", kind, "--overwrite", "--output"]
        for more in ([own, "--model", own], [str(exits), "--model", own, "--exits", str(tmp_path / "link")]):
            assert cli.main([*again, *more]) == 2
            assert "--output must not be" in capsys.readouterr().err
    export(models, exits, "--exits", str(tmp_path / "link"), "--only", "2", "--overwrite", code=2)
    assert "--output must not be" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*") if "link" not in path.parts} == kept
    for kind, word in words.items():
        assert cli.main([*word, "--output", str(tmp_path / kind), "--exits", str(exits), "--overwrite"]) == 0


def test_the_card_tells_what_the_folder_holds(models, tmp_path):
    """A card that tells of the exits that were there before; one outside the manifest could be altered unseen."""
    merged = export(models, tmp_path / "merged", "--exits", "a5", "--merge", "a24")
    card = (merged / "README.md").read_text()
    assert "layers 2, 4, 5 of a" not in card and "after layers 2, 4, 5" in card and "seed 2" in card
    assert read_exit_config(merged).model_fingerprint in card
    assert "README.md" in json.loads((merged / "manifest.json").read_text())["files"]
    ExitHeadsReader(merged)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"hidden_size": "48"},
        {"num_layers": 0},
        {"num_layers": True},
        {"family": "foo"},
        {"family": [1]},
        {"ties_embeddings": "no"},
        {"norm": "batch"},
        {"activation": ["gelu"]},
        {"position": 3},
        {"is_gated": 1},
        {"num_experts": -1},
        {"dense_layers": ["x"]},
        {"dense_layers": 3},
    ],
)
def test_a_broken_description_of_the_model_is_one_line(models, tmp_path, capsys, shape):
    """A traceback for an artifact that was edited by hand, or one read as if it were whole."""
    broken = export(models, tmp_path / "broken", "--exits", "a24")
    path = broken / "exit_config.json"
    tree = json.loads(path.read_text())
    tree["model_shape"] = {**tree["model_shape"], **shape} if shape else {}
    path.write_text(json.dumps(tree))
    write_manifest(broken)
    export(models, tmp_path / "again", "--exits", str(broken), code=2)
    error = capsys.readouterr().err
    assert str(broken) in error and error.count("\n") == 1 and all(name in error for name in shape)


def test_a_format_refuses_the_flags_of_another(models, tmp_path, capsys, monkeypatch):
    """--link passed over in silence; four processes that each write the same folder."""
    export(models, tmp_path / "refused", "--exits", "a24", "--link", code=2)
    assert "--format hf" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    export(models, tmp_path / "refused", "--exits", "a24", code=2)
    assert "one process" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--check --tolerance nan", "--tolerance must be a difference above 0 and go with --check, got nan"),
        ("--check --tolerance -1", "above 0 and go with --check, got -1"),
        ("--tolerance 0.1", "got 0.1 without it"),
        ("--text {text}", "is read by --check and --fold-bias, got neither"),
        ("--check --text {text}", "--text must have at least two tokens, got 0"),
        ("--fold-bias --text {text}", "--text must have at least two tokens, got 0"),
    ],
)
def test_a_check_that_can_not_be_made_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
):
    """Minutes of writing, and then an export that no check has seen; a flag without effect."""
    (tmp_path / "empty.txt").touch()
    write_byte_tokenizer(tmp_path / "tokenizer")
    words = ["export", "--format", "draft", "--model", str(models / "a"), "--exits", str(models / "a5"), "--exit", "5"]
    words += ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    assert cli.main([*words, *flags.format(text=tmp_path / "empty.txt").split()]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
