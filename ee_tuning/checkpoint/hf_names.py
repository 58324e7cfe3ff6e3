"""Names of tensors in the Hugging Face folders of each family, and the orientation of their matrices. Data only."""

from dataclasses import dataclass, replace

from ee_tuning.model_config.families import Family


@dataclass(frozen=True, kw_only=True)
class HFNames:
    """Names without the final `.weight` or `.bias`. A layer's names follow `layers`.{its index}."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    """The embedding of learned positions."""
    final_norm: str = "model.norm"
    output: str = "lm_head"
    layers: str = "model.layers"
    input_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    """Three equal names stand for one tensor, which holds all queries, then all keys, then all values."""
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    """The first matrix of an MLP without a gate."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate: str = "mlp.experts.{}.gate_proj"
    expert_up: str = "mlp.experts.{}.up_proj"
    expert_down: str = "mlp.experts.{}.down_proj"
    """A name with a place for the expert's index."""
    is_transposed: bool = False
    """Whether matrices of a layer are stored as [inputs, outputs]."""


_LLAMA = HFNames()
HF_NAMES: dict[Family, HFNames] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": replace(
        _LLAMA,
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        layers="transformer.h",
        input_norm="ln_1",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        attention_output="attn.c_proj",
        mlp_norm="ln_2",
        up="mlp.c_fc",
        down="mlp.c_proj",
        is_transposed=True,
    ),
    "mixtral": replace(
        _LLAMA,
        router="block_sparse_moe.gate",
        expert_gate="block_sparse_moe.experts.{}.w1",
        expert_up="block_sparse_moe.experts.{}.w3",
        expert_down="block_sparse_moe.experts.{}.w2",
    ),
    "qwen3_moe": _LLAMA,
}
