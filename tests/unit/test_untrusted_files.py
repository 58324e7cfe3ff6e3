"""What strangers' files did to readers until they were caught: `make stress` found these."""

import os
import pickle
import resource
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_files import save_stock_model
from random_models import random_llama
from safetensors.torch import load_file, save_file

from ee_tuning.checkpoint.formats import check_model, open_model
from ee_tuning.config import ModelSection
from ee_tuning.errors import InputError
from ee_tuning.json_file import parse_json
from ee_tuning.storage.manifest import holds_manifest, read_manifest
from ee_tuning.storage.metadata_pickle import read_metadata_pickle
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.torch_file import Archive


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distributed checkpoint, and the model's folder beside it in `hf`."""
    folder = tmp_path_factory.mktemp("stock")
    random_llama(folder / "hf", num_hidden_layers=2)
    save_stock_model(str(folder / "hf"), str(folder / "megatron"), 1, 1, None, True)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        model = open_model(ModelSection(path=str(folder)))
        check_model(model.source, model.config, None, verifies=True)
        for name in model.source.names():
            model.source.rows(name, 0, model.source.shape(name)[0])
    return str(error.value)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_pipe_is_not_waited_for(stock: Path, tmp_path: Path, name: str) -> None:
    """A named pipe in an archive that was unpacked: reading it never ends."""
    folder = Path(shutil.copytree(stock / "hf", tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert name in refusal(folder)
    if name == "manifest.json":
        with pytest.raises(InputError, match="no plain file"):
            read_manifest(folder, "")
        assert holds_manifest(folder)
    os.mkfifo(tmp_path / "weights.pt")
    with pytest.raises(InputError, match="no plain file"):
        MappedFile(tmp_path / "weights.pt")


@pytest.mark.parametrize("file", [".metadata", "tensors.pt"])
def test_a_pickle_gets_no_memory_for_the_asking(tmp_path: Path, file: str) -> None:
    """Six bytes that name the memo's last place made Python's own unpickler fill 30 GB with zeros."""
    bomb = b"\x80\x02Nr\xff\xff\xff\x7f."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if file == ".metadata":
        (tmp_path / file).write_bytes(bomb)
        assert read_metadata_pickle(tmp_path) is None
    else:
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
        assert Archive(tmp_path / file, MappedFile(tmp_path / file)).content is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # in KB


def test_two_tensors_in_one_place_are_refused(stock: Path, tmp_path: Path) -> None:
    """One bit of a pickle's back reference, and one rank's shard is read in the place of another's, its checksum
    right.
    """
    folder = Path(shutil.copytree(stock / "megatron", tmp_path / "model"))
    described: Any = pickle.loads((folder / ".metadata").read_bytes())
    first, second = [index for index in described.storage_data if index.fqn.endswith("linear_proj.weight")]
    described.storage_data[first] = described.storage_data[second]
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    assert "two tensors in one place" in refusal(folder)


def test_files_without_their_description_are_told_from_no_model(stock: Path, tmp_path: Path) -> None:
    """A checkpoint fetched without its hidden file, called a folder without safetensors."""
    folder = Path(shutil.copytree(stock / "megatron", tmp_path / "model"))
    shutil.copy(stock / "hf" / "config.json", folder)
    (folder / ".metadata").unlink()
    assert ".metadata is missing" in refusal(folder)


def test_a_tensor_that_the_index_forgets_is_refused(stock: Path, tmp_path: Path) -> None:
    """transformers loads all that a shard holds, whatever the index says: another model than ours."""
    tensors = load_file(stock / "hf" / "model.safetensors")
    folder = Path(shutil.copytree(stock / "hf", tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(40)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        str({"weight_map": dict.fromkeys(tensors, "one.safetensors")}).replace("'", '"')
    )
    message = refusal(folder)
    assert "q_proj.bias" in message and "model.safetensors.index.json" in message


def test_a_refusal_is_one_short_plain_line() -> None:
    """A tensor's name that clears the terminal, or fills it."""
    text = str(InputError("tensor \x1b[2J\x00 of\nshape " + "9" * 5000 + " is wrong"))
    assert text.isprintable() and len(text) <= 1000
    assert text.startswith("tensor \\x1b[2J\\x00 of shape 99") and text.endswith("is wrong")


def test_a_doubled_key_among_many_is_found_at_once() -> None:
    """A header of some MB that keeps a reader busy for hours: each name looked for among all the others."""
    names = [f'"{i}": 0' for i in range(200_000)]
    since = time.process_time()
    with pytest.raises(ValueError, match="199999 stands in it twice"):
        parse_json(("{" + ", ".join([*names, names[-1]]) + "}").encode())
    assert time.process_time() - since < 10
