"""Names of LoRA's matrices in peft's files, and how tensor-parallel ranks cut them. Pure functions."""

from ee_tuning.checkpoint.hf_names import HF_NAMES, HFNames
from ee_tuning.model.lora import ROW_PARALLEL, target_shape
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.tensor_slice import Shard, TensorSlice

PREFIX = "base_model.model."
"""peft's prefix for the names inside its wrapper."""
_FIELDS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def target_stem(target: str, names: HFNames) -> str:
    """Returns the name of a linear map within its layer."""
    stem: str = getattr(names, _FIELDS[target])
    return stem


def has_targets(config: ModelConfig) -> bool:
    """Whether the family's linear maps are single ones with these names."""
    names = HF_NAMES[config.family]
    return not names.is_transposed and names.query != names.key


def lora_shard(parameter: str, config: ModelConfig, rank: int, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a parameter such as
    `decoder.layers.0.self_attention.linear_qkv.lora.q_proj.lora_A`.
    """
    path, matrix = parameter.rsplit(".", 1)
    target, index, names = path.rpartition(".")[2], path.split(".")[2], HF_NAMES[config.family]
    name = f"{PREFIX}{names.layers}.{index}.{target_stem(target, names)}.{matrix}.weight"
    outputs, inputs = target_shape(target, config)
    cuts_columns = target in ROW_PARALLEL
    if matrix == "lora_A":
        start, stop = (tp_rank * inputs // tp, (tp_rank + 1) * inputs // tp) if cuts_columns else (0, rank)
        return Shard((TensorSlice(name, (rank, inputs), int(cuts_columns), start, stop),))
    start, stop = (0, outputs) if cuts_columns else (tp_rank * outputs // tp, (tp_rank + 1) * outputs // tp)
    return Shard((TensorSlice(name, (outputs, rank), 0, start, stop),))
