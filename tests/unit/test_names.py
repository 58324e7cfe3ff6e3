"""Hugging Face's tensors against Megatron-core's shards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ee_tuning.artifact.exit_names import exit_copy_source, exit_parameter_names, exit_shard, exit_tensor_shapes
from ee_tuning.checkpoint.names import backbone_parameter_names, backbone_shard, backbone_tensor_shapes, merge_shards
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig, RopeConfig
from ee_tuning.storage.tensor_source import TensorSource


def config(**changes: object) -> ModelConfig:
    shape = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 6,
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "norm_epsilon": 1e-5,
        "rope": RopeConfig(),
        "ties_embeddings": False,
    }
    return ModelConfig(**{**shape, **changes})


class Tensors(dict[str, Tensor], TensorSource):
    """Whole tensors in memory, as a source of slices."""

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert tuple(self[name].shape) == shape, name

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self[name][start:stop]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self[name][:, start:stop]


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return Tensors({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


GPT2 = {
    "family": "gpt2",
    "norm": "layer",
    "position": "learned",
    "activation": "gelu_tanh",
    "is_gated": False,
    "has_linear_bias": True,
    "num_query_groups": 8,
    "kv_channels": 3,
}
FAMILIES = [
    {},
    {"ties_embeddings": True},
    {"family": "qwen2", "has_qkv_bias": True},
    {"family": "qwen3", "has_qk_norm": True},
    GPT2,
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_shards_of_all_ranks_hold_the_model_and_give_it_back(tp: int, family: dict[str, object]) -> None:
    """A row read twice, or by nobody, would make another model of it at some tensor-parallel size."""
    model = config(**family)
    tensors = random_tensors(backbone_tensor_shapes(model))
    back: dict[str, Tensor] = {}
    for parameter in backbone_parameter_names(model):
        plans = [backbone_shard(parameter, model, tp, rank) for rank in range(tp)]
        shards = [tensors.shard(plan, torch.float32) for plan in plans]
        assert [tuple(shard.shape) for shard in shards] == [plan.shape for plan in plans]
        back.update(merge_shards(plans, shards))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("tp", [1, 2])
def test_queries_keys_and_values_are_fused_by_query_group(tp: int) -> None:
    """Megatron-core splits the fused rows by group: all queries first, as others fuse them, would mix up heads without
    an error.
    """
    model = config()
    tensors = random_tensors(backbone_tensor_shapes(model))
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    groups, width = model.num_query_groups, model.kv_channels
    fused = torch.cat(
        [q.view(groups, 2 * width, -1), k.view(groups, width, -1), v.view(groups, width, -1)], dim=1
    ).flatten(0, 1)
    for rank, part in enumerate(fused.chunk(tp)):
        plan = backbone_shard("decoder.layers.1.self_attention.linear_qkv.weight", model, tp, rank)
        assert torch.equal(tensors.shard(plan, torch.float32), part)


def test_each_rank_has_its_gate_above_its_up() -> None:
    """Cutting [gate; up] as one matrix would give rank 0 all of gate and rank 1 all of up."""
    model = config()
    tensors = random_tensors(backbone_tensor_shapes(model))
    gate, up = (tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    shard = tensors.shard(backbone_shard("decoder.layers.0.mlp.linear_fc1.weight", model, 2, 1), torch.float32)
    assert torch.equal(shard, torch.cat([gate[20:], up[20:]]))


@pytest.mark.parametrize(("vocab_size", "tp"), [(101, 4), (5, 4)])
def test_vocabulary_padding_is_zeros_after_the_last_token(vocab_size: int, tp: int) -> None:
    """Uninitialized padding holds anything, NaN included; with 5 tokens on 4 ranks the last rank has nothing but
    padding.
    """
    model = config(vocab_size=vocab_size)
    tensors = random_tensors(backbone_tensor_shapes(model))
    shards = [
        tensors.shard(backbone_shard("output_layer.weight", model, tp, rank), torch.float32) for rank in range(tp)
    ]
    whole = torch.cat(shards)
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(whole[:vocab_size], tensors["lm_head.weight"])
    assert not whole[vocab_size:].any()


@pytest.mark.parametrize(
    "parameter",
    [
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "module.decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.-1.mlp.linear_fc1.weight",
    ],
)
def test_a_parameter_the_family_lacks_is_an_error(parameter: str) -> None:
    """A name taken for a similar one would load weights into the wrong place."""
    with pytest.raises(KeyError):
        backbone_shard(parameter, config(), 1, 0)


@pytest.mark.parametrize("architecture", ["mlp", "layer", "adapter", "linear"])
@pytest.mark.parametrize("family", [{}, GPT2])
def test_an_exit_head_of_two_ranks_gives_its_whole_tensors_back(family: dict[str, object], architecture: Any) -> None:
    """Saving a tuned head with the halves of fc1 in rank order would swap rows of gate and up."""
    model = config(**family)
    head = ExitSpec(layer=2, architecture=architecture, ties_output=False, adapter_rank=5)
    shapes = exit_tensor_shapes((head,), model)
    tensors = random_tensors(shapes)
    back: dict[str, Tensor] = {}
    for parameter in exit_parameter_names(head, model):
        plans = [exit_shard(head, parameter, model, 2, rank) for rank in range(2)]
        back.update(merge_shards(plans, [tensors.shard(plan, torch.float32) for plan in plans]))
    assert back.keys() == shapes.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in shapes)


def test_an_exit_copies_the_layer_it_follows() -> None:
    """Exits count layers from 1 and Hugging Face from 0: off by one, the head would begin with the next layer's MLP."""
    assert exit_copy_source("exits.2.mlp.up_proj.weight", config()) == "model.layers.1.mlp.up_proj.weight"
    assert exit_copy_source("exits.2.norm.weight", config()) == "model.norm.weight"
    assert exit_copy_source("exits.2.output.weight", config()) == "lm_head.weight"
    assert exit_copy_source("exits.2.output.weight", config(ties_embeddings=True)) == "model.embed_tokens.weight"
    assert exit_copy_source("exits.2.norm.bias", config(**GPT2)) == "transformer.ln_f.bias"
    assert exit_copy_source("exits.2.mlp.c_fc.weight", config(**GPT2)) == "transformer.h.1.mlp.c_fc.weight"
    assert exit_copy_source("exits.2.layer.attn.c_attn.bias", config(**GPT2)) == "transformer.h.2.attn.c_attn.bias"
    assert (
        exit_copy_source("exits.2.layer.self_attn.q_proj.weight", config()) == "model.layers.2.self_attn.q_proj.weight"
    )
    assert exit_copy_source("exits.2.adapter.norm.weight", config()) == "model.norm.weight"
    assert exit_copy_source("exits.2.adapter.down.weight", config()) is None


def test_gpt2_keeps_its_matrices_the_other_way_round() -> None:
    """c_attn holds [inputs, queries and keys and values]: read as it lies, or fused as it lies, it is another map of
    the same size.
    """
    model = config(**GPT2)
    tensors = random_tensors(backbone_tensor_shapes(model))
    q, k, v = tensors["transformer.h.1.attn.c_attn.weight"].t().chunk(3)
    fused = torch.stack([part.view(8, 3, 24) for part in (q, k, v)], dim=1).reshape(72, 24)
    for rank, part in enumerate(fused.chunk(2)):
        plan = backbone_shard("decoder.layers.1.self_attention.linear_qkv.weight", model, 2, rank)
        assert torch.equal(tensors.shard(plan, torch.float32), part)
    plan = backbone_shard("decoder.layers.1.mlp.linear_fc2.weight", model, 2, 1)
    assert torch.equal(tensors.shard(plan, torch.float32), tensors["transformer.h.1.mlp.c_proj.weight"][20:].t())
