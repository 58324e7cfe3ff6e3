"""Hugging Face → Megatron → Hugging Face: the plain backbone that comes back is the one that went in, byte for byte."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron_files import num_padded, save_legacy
from random_models import random_llama, random_model
from safetensors.torch import load_file
from world import World

from ee_tuning import cli
from ee_tuning.config import ParallelSection
from ee_tuning.model.backbone import transformer_config
from ee_tuning.model_config.config import read_model_config
from ee_tuning.model_config.megatron_args import megatron_arguments
from ee_tuning.parallel.topology import init_parallel

CASES: list[tuple[str, dict[str, Any], torch.dtype, list[tuple[int, int]]]] = [
    ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 4}, torch.float32, [(1, 1), (2, 2), (4, 1), (1, 4)]),
    (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
        torch.bfloat16,
        [(1, 2)],
    ),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}, torch.float32, [(4, 1)]),
    ("qwen3", {}, torch.bfloat16, [(2, 1)]),
    ("gpt2", {"n_inner": 88, "n_layer": 4}, torch.float32, [(4, 1), (1, 4)]),
    ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}, torch.bfloat16, [(2, 2)]),
]


def save_again(model: str, given: str, output: str, tp: int, pp: int, dtype: torch.dtype) -> None:
    """Every rank: stock GPTModel of the shape of `model` loads `given` at TP × PP, its vocabulary padded, and saves
    itself.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    warnings.simplefilter("ignore")
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    config = read_model_config(Path(model))
    megatron = transformer_config(config, topology, dtype)
    megatron.pipeline_model_parallel_size = pp
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm" if config.norm == "rms" else None, qk_layernorm=config.has_qk_norm
    )
    with patch.object(
        torch.Tensor, "cuda", lambda tensor: tensor
    ):  # for the copy of a tied embedding on the last stage
        stock = GPTModel(
            megatron,
            spec,
            num_padded(config.vocab_size),
            config.max_position_embeddings,
            pre_process=topology.stage == 0,
            post_process=topology.stage == pp - 1,
            position_embedding_type="rope" if config.position == "rope" else "learned_absolute",
            share_embeddings_and_output_weights=config.ties_embeddings,
        ).to(dtype)
    loaded = dist_checkpointing.load({"model": stock.sharded_state_dict()}, given)
    stock.load_state_dict(loaded["model"])
    if topology.rank == 0:
        Path(output).mkdir()
    topology.barrier()
    arguments = argparse.Namespace(**{**megatron_arguments(config), "padded_vocab_size": num_padded(config.vocab_size)})
    dist_checkpointing.save({"model": stock.sharded_state_dict(), "args": arguments, "checkpoint_version": 3.0}, output)


def assert_same_model(folder: Path, model: Path) -> None:
    wanted = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    got = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    unknown = {"eos_token_ids": (), "bos_token_id": None}  # Megatron's arguments do not tell
    assert dataclasses.replace(read_model_config(folder), **unknown) == dataclasses.replace(
        read_model_config(model), **unknown
    )


def export(kind: str, model: Path, output: Path) -> None:
    assert cli.main(["export", "--format", kind, "--model", str(model), "--output", str(output)]) == 0


@pytest.mark.parametrize(
    ("family", "changes", "dtype", "layouts"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_stock_megatron_in_between_changes_no_byte(
    world: World,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    dtype: torch.dtype,
    layouts: list[tuple[int, int]],
) -> None:
    """Padding of the vocabulary left in, a fused matrix taken apart at the wrong rows, another dtype, a bias or a
    family forgotten.
    """
    model = tmp_path / "model"
    random_model(family, model, **changes).to(dtype).save_pretrained(model)
    export("megatron", model, tmp_path / "megatron")
    for tp, pp in layouts:
        again = tmp_path / f"again_{tp}_{pp}"
        world.run(save_again, str(model), str(tmp_path / "megatron"), str(again), tp, pp, dtype)
        export("hf", again, tmp_path / f"hf_{tp}_{pp}")
        assert_same_model(tmp_path / f"hf_{tp}_{pp}", model)
    export("hf", tmp_path / "megatron", tmp_path / "hf")
    assert_same_model(tmp_path / "hf", model)
    assert read_model_config(tmp_path / "hf") == read_model_config(model), (
        "what config.json beside the checkpoint tells is lost"
    )


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize(("tp", "stages"), [(4, (1, 2, 2, 1)), (2, (2, 1, 1, 2)), (4, (3, 3)), (1, (6,))])
def test_legacy_checkpoints_come_out_too(tmp_path: Path, tp: int, stages: tuple[int, ...], is_old: bool) -> None:
    """Shards of more ranks than the tests' world has; stages of uneven depth."""
    reference = random_llama(tmp_path / "model", num_key_value_heads=4)
    save_legacy(
        reference,
        read_model_config(tmp_path / "model"),
        tmp_path / "legacy",
        tp,
        stages,
        is_old=is_old,
        init_method_std=0.2,
    )
    export("hf", tmp_path / "legacy", tmp_path / "hf")
    assert_same_model(tmp_path / "hf", tmp_path / "model")
    export("megatron", tmp_path / "legacy", tmp_path / "megatron")
    export("hf", tmp_path / "megatron", tmp_path / "again")
    assert_same_model(tmp_path / "again", tmp_path / "model")


def test_what_megatron_has_no_word_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that Megatron-LM starts, by its arguments, with positions that it was not trained with."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    random_llama(tmp_path / "model", rope_parameters=yarn)
    export("megatron", tmp_path / "model", tmp_path / "megatron")
    error = capsys.readouterr().err
    assert "yarn" in error and error.count("\n") == 1
    export("hf", tmp_path / "megatron", tmp_path / "hf")
    assert read_model_config(tmp_path / "hf") == read_model_config(tmp_path / "model")
