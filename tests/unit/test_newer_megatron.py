"""What newer releases of Megatron-core write, from one process: HybridModel, fsdp_dtensor, and no common.pt."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_files import save, save_fsdp_dtensor
from hybrid_files import save_hybrid_model
from megatron_files import save_stock_model
from random_models import random_llama
from refusals import Hostile, refusal

from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import OpenModel, open_model
from ee_tuning.checkpoint.hybrid_layers import HybridLayers
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.checkpoint.verify import verify_folder
from ee_tuning.config import ModelSection
from ee_tuning.model_config.megatron_args import model_config_from_megatron


def write_hybrid(model: str, folder: str) -> None:
    save_hybrid_model(model, folder, 1, 1)


def opened(path: Path, **keys: Any) -> OpenModel:
    return open_model(ModelSection(path=str(path), **keys))


def write_without_common(model: str, folder: str) -> None:
    save_stock_model(model, folder, 1, 1, None, True, "among tensors")
    assert not (Path(folder) / "common.pt").exists()


@pytest.mark.parametrize("writer", [write_hybrid, save_fsdp_dtensor, write_without_common])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_same_model(tmp_path: Path, writer: Callable[[str, str], None], is_tied: bool) -> None:
    """Attention and MLP of different blocks together; halves of a gated MLP in the wrong order; moments for weights."""
    random_llama(tmp_path / "hf", tie_word_embeddings=is_tied)
    writer(str(tmp_path / "hf"), str(tmp_path / "megatron"))
    wanted, got = opened(tmp_path / "hf"), opened(tmp_path / "megatron")
    got.source.check_complete(got.config)
    assert got.kind == "megatron" and fingerprint(*got[:2]) == fingerprint(*wanted[:2])
    for name, shape in backbone_tensor_shapes(got.config).items():
        assert torch.equal(got.source.rows(name, 0, shape[0]), wanted.source.rows(name, 0, shape[0])), name
    assert verify_folder(tmp_path / "megatron")


@pytest.mark.parametrize("pattern", ["M*-M*-", "*-*", "-*-*", "**--", "*-*G", "*-E"])
def test_other_hybrid_models_are_refused(tmp_path: Path, pattern: str) -> None:
    """A state-space layer that is left out, or an order of attention and MLP that a transformer does not have."""
    message = refusal(lambda: model_config_from_megatron({"hybrid_layer_pattern": pattern}, tmp_path))
    assert pattern in message and "*-*-" in message
    parts = {"M": "mixer.in_proj", "*": "self_attention.linear_qkv", "-": "mlp.linear_fc1", "E": "mlp.router"}
    keys = [
        f"decoder.layers.{index}.{parts.get(kind, 'self_attention.in_proj' if kind == 'G' else '')}.weight"
        for index, kind in enumerate(pattern)
    ]
    assert str(tmp_path) in refusal(lambda: HybridLayers(keys, tmp_path))


def test_a_pattern_with_stages_and_experts_is_counted_in_blocks() -> None:
    """Bars between stages counted as layers; dense blocks among those with experts taken for the others."""
    arguments = {
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "vocab_size": 10,
        "num_experts": 4,
        "num_layers": 6,
        "hybrid_layer_pattern": "*E|*-*E/*E",
    }
    config = model_config_from_megatron(arguments, Path("args"))
    assert (config.num_layers, config.num_experts, config.dense_layers) == (3, 4, (2,))
    dense = model_config_from_megatron({**arguments, "hybrid_layer_pattern": "*-*-"}, Path("args"))
    assert (dense.num_layers, dense.num_experts) == (2, 0)


def test_arguments_among_the_tensors_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint from a stranger that runs commands where its arguments are read."""
    monkeypatch.chdir(tmp_path)
    state = {"args": argparse.Namespace(hook=Hostile()), "model": {"decoder.final_layernorm.weight": torch.ones(4)}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "model"))
    assert "posix.system" in refusal(lambda: opened(tmp_path / "model"))
    assert not (tmp_path / "hostile").exists()


def test_without_arguments_the_shape_is_asked_for(tmp_path: Path) -> None:
    """A traceback, or a guess, where weights were saved alone."""
    random_llama(tmp_path / "hf")
    tensors = {"decoder.final_layernorm.weight": torch.ones(48)}
    dcp.save({"model": tensors}, storage_writer=dcp.FileSystemWriter(tmp_path / "weights"))
    assert "--config" in refusal(lambda: opened(tmp_path / "weights"))
    save(tensors, str(tmp_path / "hf"), str(tmp_path / "few"))
    few = opened(tmp_path / "few")
    assert "embedding.word_embeddings.weight" in refusal(lambda: few.source.check_complete(few.config))
