"""The linear maps that LoRA adapts: names, shapes, and how tensor parallelism cuts them."""

from ee_tuning.model_config.config import ModelConfig

FUSED = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Megatron-core's linear map -> Hugging Face's, in order."""
TARGETS = tuple(name for names in FUSED.values() for name in names)
ROW_PARALLEL = ("o_proj", "down_proj")
"""Maps of which each tensor-parallel rank has a part of the inputs; of the others it has a part of the outputs."""


def target_shape(target: str, config: ModelConfig) -> tuple[int, int]:
    """Returns (outputs, inputs) of one of TARGETS over all ranks."""
    hidden, inner = config.hidden_size, config.ffn_hidden_size
    queries, keys = (n * config.kv_channels for n in (config.num_attention_heads, config.num_query_groups))
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }[target]
