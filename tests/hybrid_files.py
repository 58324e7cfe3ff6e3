"""Checkpoints of Megatron-core's HybridModel, by its own code: `*-` for each block of a transformer."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron_files import fill, num_padded, saved_arguments
from torch import Tensor

from ee_tuning.config import ParallelSection
from ee_tuning.model.backbone import transformer_config
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.parallel.topology import Topology, init_parallel


def save_hybrid_model(model: str, folder: str, tp: int, pp: int) -> None:
    """Every rank of a world: a HybridModel with the weights of the Hugging Face folder `model`, saved by Megatron-core
    as `torch_dist`.
    """
    from megatron.core import dist_checkpointing

    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    config = read_model_config(Path(model))
    pattern = "*-" * config.num_layers
    hybrid = _hybrid_model(config, topology, pattern)
    fill(_as_in_gpt(hybrid), model, config, topology)
    if topology.rank == 0:
        Path(folder).mkdir(parents=True)
    torch.distributed.barrier()
    arguments = saved_arguments(config, num_layers=len(pattern), hybrid_layer_pattern=pattern)
    dist_checkpointing.save(
        {"model": hybrid.sharded_state_dict(), "args": arguments, "checkpoint_version": 3.0}, folder
    )


def _hybrid_model(config: ModelConfig, topology: Topology, pattern: str) -> Any:
    """This rank's part. Its spec is the stock one with local modules in place of Transformer Engine's, which are named
    as those are.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    warnings.simplefilter("ignore")
    megatron = transformer_config(config, topology, torch.float32)
    megatron.num_layers, megatron.pipeline_model_parallel_size = len(pattern), topology.pp
    layer = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=layer.mlp,
        mlp_bda=layer.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    layers = {
        "attention_layer": ModuleSpec(TransformerLayer, submodules=attention),
        "mlp_layer": ModuleSpec(MLPLayer, submodules=mlp),
    }
    keys: dict[str, Any] = {
        "vocab_size": num_padded(config.vocab_size),
        "max_sequence_length": config.max_position_embeddings,
        "pre_process": topology.is_first_stage,
        "post_process": topology.is_last_stage,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": config.ties_embeddings,
    }
    try:
        from megatron.core.models.hybrid import hybrid_block
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:  # before 0.18
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.ssm import mamba_block

        mamba_block.TENorm = WrappedTorchNorm
        spec = ModuleSpec(mamba_block.MambaStack, submodules=mamba_block.MambaStackSubmodules(**layers))
        return MambaModel(megatron, spec, hybrid_override_pattern=pattern, **keys)
    hybrid_block.TENorm = WrappedTorchNorm
    spec = ModuleSpec(hybrid_block.HybridStack, submodules=hybrid_block.HybridStackSubmodules(**layers))
    size = len(pattern) // topology.pp
    parts = "|".join(pattern[start : start + size] for start in range(0, len(pattern), size))
    return HybridModel(megatron, spec, hybrid_layer_pattern=parts, **keys)


def _as_in_gpt(hybrid: Any) -> Iterator[tuple[str, Tensor]]:
    """Named as a GPTModel's parameters, with global layer indices."""
    first = hybrid.decoder.layers[0].layer_number - 1
    for name, parameter in hybrid.named_parameters():
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            name = f"decoder.layers.{(first + int(match[1])) // 2}.{match[2]}"
        yield name.replace("decoder.final_norm.", "decoder.final_layernorm."), parameter
