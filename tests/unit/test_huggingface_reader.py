"""Reading a Hugging Face folder by slices, and refusing what is wrong with one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import random_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.huggingface import HuggingFaceReader, read_backbone_tensor
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import read_model_config

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    """One model as one file and as shards, and its tensors."""
    root = tmp_path_factory.mktemp("llama")
    model = random_llama(root / "single", num_hidden_layers=2)
    model.save_pretrained(root / "sharded", max_shard_size="40KB")
    return root / "single", root / "sharded", dict(model.state_dict())


@pytest.fixture
def single(saved: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved[0], tmp_path / "single"))


@pytest.fixture
def sharded(saved: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved[1], tmp_path / "sharded"))


def refusal(folder: Path) -> str:
    """The InputError that reading the whole model ends with."""
    with pytest.raises(InputError) as caught:
        config = read_model_config(folder)
        with HuggingFaceReader(folder) as reader:
            reader.check_complete(config)
            for name in reader.names():
                reader.full(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    tree = json.loads((folder / INDEX).read_text())
    change(tree["weight_map"])
    (folder / INDEX).write_text(json.dumps(tree))


def test_one_file_and_shards_give_the_same_tensors_by_slices(saved: tuple[Path, Path, dict[str, Tensor]]) -> None:
    """A slice off by a row, or a shard taken for another, would load as a different model."""
    for folder in saved[:2]:
        with HuggingFaceReader(folder) as reader:
            reader.check_complete(read_model_config(folder))
            assert reader.names() == sorted(saved[2])
            for name, tensor in saved[2].items():
                assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
                assert torch.equal(reader.full(name), tensor)
                assert torch.equal(reader.rows(name, 3, 11), tensor[3:11])
                if tensor.dim() == 2:
                    assert torch.equal(reader.columns(name, 5, 7), tensor[:, 5:7])
    assert len(list(saved[1].glob("*.safetensors"))) > 2


def test_the_output_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    """A tied model stores no lm_head."""
    model = random_llama(tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    config = read_model_config(tmp_path)
    with HuggingFaceReader(tmp_path) as reader:
        reader.check_complete(config)
        output = read_backbone_tensor(reader, config, "output_layer.weight", 2, 1, torch.float64)
    expected = model.state_dict()["model.embed_tokens.weight"][51:].double()
    assert output.dtype == torch.float64 and torch.equal(output[:50], expected) and not output[50:].any()


def test_a_model_has_one_fingerprint_however_it_is_sharded_and_another_one_has_another(
    saved: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Exits would be refused by their own model saved again, or taken by another."""
    random_llama(tmp_path, num_hidden_layers=2, seed=1)
    prints = []
    for folder in (*saved[:2], tmp_path):
        with HuggingFaceReader(folder) as reader:
            prints.append(fingerprint(reader, read_model_config(folder)))
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_sees_the_first_and_the_last_row(single: Path) -> None:
    """A fine-tuned model may differ in few rows: those that are read must count, in the very last tensor too."""
    config = read_model_config(single)
    tensors = load_file(single / "model.safetensors")
    prints = set()
    for name, row in (
        ("lm_head.weight", 0),
        ("lm_head.weight", 100),
        ("model.norm.weight", 47),
        ("model.norm.weight", 16),
    ):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][row] += 1
        save_file(changed, single / "model.safetensors")
        with HuggingFaceReader(single) as reader:
            prints.add(fingerprint(reader, config))
    assert len(prints) == 4


def test_a_truncated_file_is_named(single: Path) -> None:
    """A download that broke off."""
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(single)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """A download that left a file out."""
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    assert str(path) in refusal(sharded)


def test_no_weights_at_all(single: Path) -> None:
    """A folder with pytorch_model.bin alone."""
    (single / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(single)


@pytest.mark.parametrize("target", ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", ""])
def test_an_index_leads_nowhere_else(sharded: Path, target: str) -> None:
    """A hostile index could have any file of the user's read."""
    edit_index(sharded, lambda files: files.update({"model.norm.weight": target}))
    assert INDEX in refusal(sharded)


def test_a_tensor_that_the_index_puts_elsewhere_is_refused(sharded: Path) -> None:
    """Which of two copies is meant nobody knows."""
    first, *_, last = sorted(path.name for path in sharded.glob("*.safetensors"))
    tensors = load_file(sharded / last)
    tensors["model.embed_tokens.weight"] = torch.zeros(101, 48)
    assert json.loads((sharded / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"] == first
    save_file(tensors, sharded / last)
    message = refusal(sharded)
    assert "model.embed_tokens.weight" in message and first in message and last in message


def test_a_tensor_that_stands_in_the_index_twice_is_refused(sharded: Path) -> None:
    """json keeps the later one in silence."""
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors",')
    )
    assert "model.norm.weight" in refusal(sharded)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(47)}), "model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "model.norm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(40)}), "q_proj.bias"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(88, 48)}),
            "model.layers.2.mlp.up_proj.weight",
        ),
    ],
    ids=["missing", "wrong shape", "quantized", "bias the config lacks", "layer the config lacks"],
)
def test_weights_that_the_config_does_not_describe_are_named(
    single: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    """A tensor ignored or broadcast gives a model that is silently another."""
    tensors = load_file(single / "model.safetensors")
    change(tensors)
    save_file(tensors, single / "model.safetensors")
    message = refusal(single)
    assert named in message and str(single) in message
