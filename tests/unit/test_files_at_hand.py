"""Folders as they lie about on disks: links, shards without an index, weights in other forms, more files than may be
open.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from megatron_files import save_legacy, save_stock_model
from random_models import random_llama
from refusals import refusal

from ee_tuning.artifact.inspect import model_facts
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import OpenModel, open_model
from ee_tuning.checkpoint.verify import verify_folder
from ee_tuning.config import ModelSection
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import read_model_config
from ee_tuning.storage import links, open_files

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`single` and `sharded`, one model, `sharded` in more files than a low limit allows; `legacy` and `megatron`, the
    same.
    """
    folder = tmp_path_factory.mktemp("saved")
    model = random_llama(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="15KB")
    save_legacy(model, read_model_config(folder / "single"), folder / "legacy", 2, (2, 2, 2), is_old=False)
    save_stock_model(str(folder / "single"), str(folder / "megatron"), 1, 1, None, True)
    return folder


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may rearrange."""
    return Path(shutil.copytree(saved / "sharded", tmp_path / "sharded"))


def opened(folder: Path) -> OpenModel:
    model = open_model(ModelSection(path=str(folder)))
    model.source.check_complete(model.config)
    return model


def print_of(folder: Path) -> str:
    return fingerprint(*opened(folder)[:2])


def test_links_that_the_owner_made_are_followed(saved: Path, sharded: Path, tmp_path: Path) -> None:
    """Weights linked from a store, a cache whose blobs were moved to another disk: refused as leading out of the
    folder.
    """
    wanted, store = print_of(saved / "single"), tmp_path / "store"
    store.mkdir()
    shards = sorted(sharded.glob("*.safetensors"))
    for number, shard in enumerate(shards):
        shard.rename(store / shard.name)
        shard.symlink_to(store / shard.name if number % 2 else os.path.relpath(store / shard.name, sharded))
    assert print_of(sharded) == wanted and verify_folder(sharded)
    cache = tmp_path / "models--a--b"
    (cache / "snapshots" / "0123").mkdir(parents=True)
    (cache / "blobs").symlink_to(store)
    for file in sharded.iterdir():
        if file not in shards:
            shutil.copy(file, store)
        (cache / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert print_of(cache / "snapshots" / "0123") == wanted
    shutil.copytree(saved / "legacy", tmp_path / "legacy" / "model", symlinks=True)
    place = tmp_path / "legacy" / "model" / "mp_rank_00_001"
    place.rename(store / "mp")
    place.symlink_to(store / "mp")
    assert print_of(tmp_path / "legacy" / "model") == wanted


def test_a_link_of_another_user_is_named(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that many may write to, anybody could have another file read."""
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(links, "_trusted_owners", lambda folder: {-1})
    message = refusal(print_of, sharded)
    assert all(word in message for word in (f"{path} is a link of another user", "elsewhere", "make the link yourself"))


@pytest.mark.parametrize("kind", ["dangling", "loop"])
@pytest.mark.parametrize("name", ["shard", INDEX, "config.json"])
def test_a_link_to_nothing_is_told(sharded: Path, kind: str, name: str) -> None:
    """Called a folder without weights, or a file to be fetched again."""
    path = sorted(sharded.glob("*.safetensors"))[1] if name == "shard" else sharded / name
    path.unlink()
    path.symlink_to(path.name if kind == "loop" else "../../blobs/0123")
    message = refusal(print_of, sharded)
    assert str(path) in message and ("link" in message), message
    assert kind == "loop" or "../../blobs/0123, which is not there" in message


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_names_files_of_its_folder_alone(sharded: Path, target: str) -> None:
    """A downloaded index could have any file of the user's read, which no link of the user's allows."""
    tree = json.loads((sharded / INDEX).read_text())
    tree["weight_map"]["model.norm.weight"] = target
    (sharded / INDEX).write_text(json.dumps(tree))
    message = refusal(print_of, sharded)
    assert INDEX in message and repr(target) in message and "a file of this very folder" in message


def test_shards_without_their_index_are_told_from_no_weights(sharded: Path) -> None:
    """`holds neither`, though all of the weights are there."""
    (sharded / INDEX).unlink()
    message = refusal(print_of, sharded)
    assert (
        message.startswith(f"{sharded / INDEX} is missing")
        and "model-00001-of-" in message
        and "fetch it, too" in message
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", ["pytorch_model.bin, which is not read", "save_pretrained"]),
        ("model-q4.gguf", ["model-q4.gguf"]),
        ("consolidated.safetensors", ["consolidated.safetensors", "call the file model.safetensors"]),
        ("training_args.bin", ["holds neither; fetch"]),
    ],
)
def test_weights_in_another_form_are_named(saved: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    """A folder with .bin files alone: nothing said how to get on; `inspect` called its weights missing."""
    shutil.copy(saved / "single" / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"x")
    message = refusal(print_of, tmp_path)
    assert all(word in message for word in words), message
    assert (name in model_facts(tmp_path)["format"]) == (name != "training_args.bin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            ["pointer of Git LFS", "git lfs pull"],
        ),
        (b"<!DOCTYPE html><html>login</html>", ["web page"]),
        (b"GGUF\x03\x00\x00\x00", ["GGUF"]),
        (b"PK\x03\x04" + b"\0" * 60, ["torch.save"]),
    ],
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", INDEX, "common.pt", "mp_rank_00_000/model_optim_rng.pt"]
)
def test_what_a_file_holds_instead_is_told(
    saved: Path, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    """A clone without Git LFS: `its header is broken; fetch it again`, which gives the same pointer again."""
    source = {"common.pt": "megatron", INDEX: "sharded"}.get(name, "legacy" if "/" in name else "single")
    folder = Path(shutil.copytree(saved / source, tmp_path / "model"))
    (folder / name).write_bytes(content)
    message = refusal(print_of, folder)
    if not (content.startswith(b"PK") and name.endswith(".pt")):
        assert all(word in message for word in [str(folder / name), *words]), message


def test_a_tokenizer_that_is_a_pointer_is_told(tmp_path: Path) -> None:
    """The reason that a tokenizers' parser gives: expected value at line 1."""
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match=r"tokenizer.json is a pointer of Git LFS"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.bin", b"GGUF", ["GGUF", "one that ends in .gguf"]),
        ("m.gguf", None, ["GGUF", "there is no"]),
        ("model.safetensors", b"xxxxxxxxxx", ["is a file", "the folder"]),
        ("config.json", b"{}", ["is a file", "config.json"]),
    ],
)
def test_a_file_is_no_folder(tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    """`--model file.gguf`: there is no folder, though there is a file."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(print_of, tmp_path / name)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq in 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "gptq in 8 bits"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes in 4 bits"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_quantized_weights_are_told_by_their_method(
    saved: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    """`config and weights do not belong together`, though the config names what they are."""
    folder = Path(shutil.copytree(saved / "single", tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": fields}))
    message = refusal(print_of, folder)
    assert (
        f"quantized by {words} (quantization_config)" in message
        and "give the model that they were made from" in message
    )


@pytest.mark.parametrize("kind", ["sharded", "legacy", "megatron"])
def test_few_files_are_open_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A model of sixty shards under a low limit of open files: `can not be read: Too many open files; fetch it
    again`.
    """
    monkeypatch.setattr(open_files, "_num_open", lambda: 2)
    before, most = len(os.listdir("/proc/self/fd")), 0
    model = opened(saved / kind)
    for name in model.source.names() * 2:
        assert torch.isfinite(model.source.rows(name, 0, model.source.shape(name)[0])).all()
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert len(model.source.weight_files()) > (30 if kind == "sharded" else 0) and most <= 2 * 2 + 1
    assert verify_folder(saved / kind)


def test_a_file_that_is_replaced_meanwhile_is_not_read_on(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a model from before and half from after it was written anew."""
    monkeypatch.setattr(open_files, "_num_open", lambda: 1)
    model = opened(sharded)
    path = sharded / model.source.files["model.norm.weight"]  # type: ignore[attr-defined]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match="was changed while it was read"):
        for name in model.source.names():
            model.source.rows(name, 0, 1)


def test_too_many_open_files_are_not_blamed_on_the_download(tmp_path: Path) -> None:
    """The cause was in the message, the remedy was for another."""
    message = str(open_files.unreadable(tmp_path / "x", OSError(24, "Too many open files")))
    assert "ulimit -n" in message and "fetch" not in message
