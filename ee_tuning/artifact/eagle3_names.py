"""The parameters of an EAGLE-3 drafting head: their names in a published head, and how ranks cut them.

Pure functions. The names are those that vLLM's LlamaForCausalLMEagle3 reads, except for `output`, which is `lm_head`
there; an artifact has them after `exits.{l}.`.
"""

from ee_tuning.checkpoint.names import mlp_shard, uncut
from ee_tuning.model.draft_spec import DraftSpec
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.tensor_slice import Shard, TensorSlice

LAYER = "midlayer."


def draft_parameter_names(draft: DraftSpec) -> list[str]:
    """Returns all parameters of the head except its output matrix."""
    norms = ["input_norm.weight"] * draft.norm_before_fc
    norms += [f"fc_norm.{index}.weight" for index in range(len(draft.aux_layers) if draft.fc_norm else 0)]
    attention = ["qkv", "o_proj", *(["q_norm", "k_norm"] if draft.family == "qwen3" else [])]
    layer = [
        "input_layernorm",
        "hidden_norm",
        *(f"self_attn.{each}" for each in attention),
        "post_attention_layernorm",
        "mlp.fc1",
        "mlp.fc2",
    ]
    return ["fc.weight", *norms, *(f"{LAYER}{each}.weight" for each in layer), "norm.weight"]


def draft_shard(draft: DraftSpec, parameter: str, prefix: str, model: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a parameter, one of `draft_parameter_names`; `prefix` begins the names of its
    slices.
    """
    own, width, num_read = draft.layer_config(model), model.hidden_size, len(draft.aux_layers)
    if parameter == "fc.weight":
        return uncut(f"{prefix}fc.weight", (width, num_read * width))
    if parameter == "input_norm.weight":
        return uncut(f"{prefix}{parameter}", (num_read * width,))
    part = parameter.removeprefix(LAYER)
    if part.startswith("mlp."):
        return mlp_shard(part.split(".")[1], "weight", prefix + LAYER, own, tp, tp_rank)
    if part == "self_attn.qkv.weight":
        return Shard(
            tuple(
                TensorSlice(
                    f"{prefix}{LAYER}self_attn.{which}_proj.weight",
                    (heads * own.kv_channels, 2 * width),
                    0,
                    tp_rank * heads // tp * own.kv_channels,
                    (tp_rank + 1) * heads // tp * own.kv_channels,
                )
                for which, heads in (
                    ("q", own.num_attention_heads),
                    ("k", own.num_query_groups),
                    ("v", own.num_query_groups),
                )
            )
        )
    if part == "self_attn.o_proj.weight":
        inner = own.num_attention_heads * own.kv_channels
        return Shard(
            (TensorSlice(prefix + parameter, (width, inner), 1, tp_rank * inner // tp, (tp_rank + 1) * inner // tp),)
        )
    return uncut(prefix + parameter, (own.kv_channels if part.endswith(("q_norm.weight", "k_norm.weight")) else width,))


def draft_copy_source(part: str, draft: DraftSpec, model: ModelConfig) -> str | None:
    """Returns the backbone tensor that initializes the head's tensor `part`, or None for a random one.

    These are the last layer's MLP and its norm, if the head's layer is as wide, and the final norm and the output
    matrix in any case.
    """
    is_alike = (
        model.is_gated and not model.has_experts(model.num_layers) and model.ffn_hidden_size == draft.ffn_hidden_size
    )
    name = part.removeprefix(LAYER)
    if part.startswith(LAYER) and is_alike and name.startswith(("mlp.", "post_attention_layernorm.")):
        return f"model.layers.{model.num_layers - 1}.{name}"
    return None
