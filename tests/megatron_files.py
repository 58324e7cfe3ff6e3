"""Megatron checkpoints for the tests: distributed ones by stock Megatron-core itself, legacy ones put together by
hand.
"""

import argparse
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from megatron_arguments import other_arguments
from torch import Tensor

from ee_tuning.checkpoint.huggingface import HuggingFaceReader
from ee_tuning.checkpoint.names import backbone_shard
from ee_tuning.config import ParallelSection
from ee_tuning.model.backbone import transformer_config
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.model_config.megatron_args import megatron_arguments
from ee_tuning.parallel.topology import Topology, init_parallel


def saved_arguments(config: ModelConfig, **changes: Any) -> argparse.Namespace:
    """What Megatron-LM saves beside such a model, with what the reader has to pass over."""
    fields = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": num_padded(config.vocab_size),
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.norm_epsilon,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope.theta),
        "rotary_percent": 1.0,
        "untie_embeddings_and_output_weights": not config.ties_embeddings,
        "params_dtype": torch.float32,
        "num_experts": None,
        **other_arguments(),
    }
    return argparse.Namespace(**{**fields, **changes})


def save_stock_model(
    model: str,
    folder: str,
    tp: int,
    pp: int,
    metadata: dict[str, Any] | None,
    has_fused_names: bool,
    place: Literal["usual", "among tensors", "nowhere"] = "usual",
) -> None:
    """Every rank of a world: a stock GPTModel with the weights of the Hugging Face folder `model`, saved by
    Megatron-core. `place`: where its arguments are; since 0.19 they usually lie among the tensors.
    """
    from megatron.core import dist_checkpointing

    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    config = read_model_config(Path(model))
    stock = stock_model(config, topology, num_padded(config.vocab_size))
    if not has_fused_names:
        for layer in stock.decoder.layers:
            layer.submodules_config.sharded_state_dict_keys_map.clear()
    fill(stock_parameters(stock), model, config, topology)
    if topology.rank == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    arguments = saved_arguments(config, **(megatron_arguments(config) if config.num_experts else {}))
    state = {
        "model": stock.sharded_state_dict(metadata=metadata),
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 100,
        "opt_param_scheduler": {"max_lr": 1e-4},
    }
    if place == "nowhere":
        del state["args"]
    if place == "among tensors":
        state["common_state"] = dist_checkpointing.ShardedObject(
            "common_state", dict(state), (1,), (0,), replica_id=topology.rank
        )
        del state["common_state"].data["model"]
    dist_checkpointing.save(state, folder)
    if place == "among tensors":
        torch.distributed.barrier()
        (Path(folder) / "common.pt").unlink(missing_ok=True)


def fill(parameters: Iterable[tuple[str, Tensor]], model: str, config: ModelConfig, topology: Topology) -> None:
    """Copies the weights of the Hugging Face folder `model` into a GPTModel's parameters."""
    tp, rank = topology.tp, topology.tp_rank
    with HuggingFaceReader(Path(model)) as reader, torch.no_grad():
        for name, parameter in parameters:
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                whole = reader.full("lm_head.weight" if name.startswith("output") else "model.embed_tokens.weight")
                parameter.copy_(padded(whole).chunk(tp)[rank])
            else:
                parameter.copy_(reader.shard(backbone_shard(name, config, tp, rank), torch.float32))


def stock_model(config: ModelConfig, topology: Topology, padded_vocab_size: int) -> Any:
    """This rank's part of Megatron-core's GPTModel from its local layer spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    warnings.simplefilter("ignore")
    megatron = transformer_config(config, topology, torch.float32)
    megatron.pipeline_model_parallel_size = topology.pp
    spec = get_gpt_decoder_block_spec(megatron, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        megatron,
        spec,
        padded_vocab_size,
        config.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.ties_embeddings,
    )


def stock_parameters(stock: Any) -> Iterator[tuple[str, Tensor]]:
    """Named with global layer indices."""
    offset = stock.decoder.layers[0].layer_number - 1
    for name, parameter in stock.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{int(local) + offset}.{rest}"
        yield name, parameter


def num_padded(vocab_size: int) -> int:
    """Rows of the vocabulary in the files."""
    return -(-vocab_size // 128) * 128


def padded(whole: Tensor) -> Tensor:
    """The vocabulary's rows, and rows of nines that nobody may read."""
    return torch.cat((whole, torch.full((num_padded(len(whole)) - len(whole), whole.shape[1]), 9.0)))


def save_legacy(
    reference: Any,
    config: ModelConfig,
    folder: Path,
    tp: int,
    stages: tuple[int, ...],
    *,
    is_old: bool,
    exits: dict[int, dict[str, Tensor]] | None = None,
    **changes: Any,
) -> None:
    """`mp_rank_…` folders with the weights of the transformers model `reference`, `stages` layers to each stage.

    `exits`: EE-LLM's, in the old layout alone: its layer numbers (1-based) to tensors norm, gate, up, down (or no MLP)
    and output; `block`: the index within the stage of the layer that the exit's own layer is like.
    """
    weights = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    for rank in range(tp):
        first = 0
        for stage, depth in enumerate(stages):
            tensors: dict[str, Tensor] = {}
            for local in range(depth):
                tensors.update(
                    {
                        f"decoder.layers.{local}.{name}": tensor
                        for name, tensor in _layer(weights, config, f"model.layers.{first + local}.", tp, rank).items()
                    }
                )
            own = {
                number - first - 1: exit
                for number, exit in sorted((exits or {}).items())
                if first < number <= first + depth
            }
            first += depth
            if stage == 0:
                tensors["embedding.word_embeddings.weight"] = padded(weights["model.embed_tokens.weight"]).chunk(tp)[
                    rank
                ]
            if stage == len(stages) - 1:
                tensors["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
                tensors["output_layer.weight"] = padded(weights["lm_head.weight"]).chunk(tp)[rank]
            model = (
                _as_old(tensors)
                if is_old
                else {**tensors, "decoder.layers.0.self_attention.linear_qkv._extra_state": None}
            )
            if own:
                _add_exits(model["language_model"], own, tp, rank)
            state = {
                "model": {name: _cloned(part) for name, part in model.items()},
                "args": saved_arguments(config, **changes),
                "checkpoint_version": 3.0,
                "iteration": 7,
                "rng_state": [{"np_rng_state": _numpy_state()}],
            }
            place = folder / (f"mp_rank_{rank:02d}_{stage:03d}" if len(stages) > 1 else f"mp_rank_{rank:02d}")
            place.mkdir(parents=True)
            torch.save(state, place / "model_optim_rng.pt")


def _layer(weights: dict[str, Tensor], config: ModelConfig, prefix: str, tp: int, rank: int) -> dict[str, Tensor]:
    groups, hidden = config.num_query_groups, config.hidden_size
    parts = [weights[f"{prefix}self_attn.{part}_proj.weight"].reshape(groups, -1, hidden) for part in ("q", "k", "v")]
    return {
        "input_layernorm.weight": weights[f"{prefix}input_layernorm.weight"],
        "self_attention.linear_qkv.weight": torch.cat(parts, dim=1).reshape(-1, hidden).chunk(tp)[rank],
        "self_attention.linear_proj.weight": weights[f"{prefix}self_attn.o_proj.weight"].chunk(tp, dim=1)[rank],
        "pre_mlp_layernorm.weight": weights[f"{prefix}post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat(
            [weights[f"{prefix}mlp.{part}_proj.weight"].chunk(tp)[rank] for part in ("gate", "up")]
        ),
        "mlp.linear_fc2.weight": weights[f"{prefix}mlp.down_proj.weight"].chunk(tp, dim=1)[rank],
    }


def _as_old(tensors: dict[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {"encoder": {}}
    for name, tensor in tensors.items():
        if name.startswith("decoder."):
            for new, old in (
                ("decoder.", ""),
                ("self_attention.linear_qkv", "self_attention.query_key_value"),
                ("self_attention.linear_proj", "self_attention.dense"),
                ("linear_fc1", "dense_h_to_4h"),
                ("linear_fc2", "dense_4h_to_h"),
                ("pre_mlp_layernorm", "post_attention_norm"),
                ("input_layernorm", "input_norm"),
                ("final_layernorm", "final_norm"),
            ):
                name = name.replace(new, old)
            tree["encoder"][name] = tensor
        elif name.startswith("embedding."):
            tree["embedding"] = {"word_embeddings": {"weight": tensor}}
        else:
            tree["output_layer"] = {"weight": tensor}
    return {"language_model": tree}


def _add_exits(tree: dict[str, Any], own: dict[int, dict[str, Tensor]], tp: int, rank: int) -> None:
    """EE-LLM's additions to a stage: by local layer, exit norms and MLPs beside the layers' own; output matrices in
    order.
    """
    encoder = tree["encoder"]
    for local, parts in own.items():
        if "norm" in parts:
            encoder[f"layers.{local}.exit_norm.weight"] = parts["norm"]
        if "block" in parts:  # the index of a layer of this stage, whose weights the exit's own layer gets
            own_layer = {
                name: tensor for name, tensor in encoder.items() if name.startswith(f"layers.{int(parts['block'])}.")
            }
            for name, tensor in own_layer.items():
                encoder[f"layers.{local}.exit_block.{name.split('.', 2)[2]}"] = tensor
        if "gate" in parts:
            for name in ("dense_h_to_4h", "dense_4h_to_h"):
                encoder[f"layers.{local}.mlp.trunk.{name}.weight"] = encoder.pop(f"layers.{local}.mlp.{name}.weight")
            encoder[f"layers.{local}.mlp.branch.dense_h_to_4h.weight"] = torch.cat(
                [parts[n].chunk(tp)[rank] for n in ("gate", "up")]
            )
            encoder[f"layers.{local}.mlp.branch.dense_4h_to_h.weight"] = parts["down"].chunk(tp, dim=1)[rank]
    tree["exit_output_layer"] = {
        f"{i}.weight": padded(parts["output"]).chunk(tp)[rank] for i, parts in enumerate(own.values())
    }


def _cloned(part: Any) -> Any:
    """Tensors with storages of their own: torch.save writes all of what a view is cut from."""
    if isinstance(part, dict):
        return {name: _cloned(value) for name, value in part.items()}
    return part.clone() if isinstance(part, Tensor) else part


def _numpy_state() -> Any:
    import numpy

    return numpy.random.RandomState(0).get_state()
