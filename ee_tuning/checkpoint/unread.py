"""Tensors of a model's files that no parameter uses: a few are known to be harmless, and others identify another model.

None is ignored silently, because leaving one out may change the model.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig

_BUFFER = re.compile(
    r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|transformer\.h\.\d+\.attn\.(masked_)?bias"
)
"""Buffers of old versions: frequencies that follow from the config, and GPT-2's causal masks."""
MERGE = (
    "merge it by peft (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)) and give the folder of "
    "the merged model"
)
_MEANINGFUL = (
    (
        re.compile(
            r"(^|\.)(lora_|base_layer\.|modules_to_save\.|dora_|ia3_|hada_|lokr_|vera_|oft_|prompt_encoder|base_model\.model\.|"
            r"(.*\.)?adapter\.linear_(in|out)\.)"
        ),
        "an adapter that is not merged into the model",
        MERGE,
    ),
    (
        re.compile(
            r"\.(qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|absmax|quant_map|SCB|"
            r"quant_state\..+|weight\.(absmax|quant_map|nested_\w+|quant_state\..+))$"
        ),
        "quantized weights",
        "give the model that they were made from, in bfloat16, float16 or float32",
    ),
    (
        re.compile(r"(^|\.)(score|classifier|v_head|value_head|reward_head|regression_head)\."),
        "a head that scores texts instead of predicting tokens",
        "give the language model, saved without that head",
    ),
    (
        re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\."),
        "a model that reads more than text",
        "give the language model in it, saved by itself",
    ),
    (
        re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."),
        "a model that was saved in what it was wrapped in for training (torch.compile, DDP, FSDP)",
        "save the model inside (model._orig_mod or model.module, by save_pretrained)",
    ),
)


def is_buffer(name: str) -> bool:
    """Whether a tensor of a Hugging Face folder is a buffer without effect."""
    return _BUFFER.fullmatch(name) is not None


def refuse_meaningful(names: Iterable[tuple[str, Path]]) -> None:
    """Raises InputError where one of these tensors shows that the files are no plain language model, with advice.

    Call it before anything else is reported as missing.
    """
    for name, path in names:
        for pattern, what, remedy in _MEANINGFUL:
            if pattern.search(name):
                raise InputError(f"{path}: tensor {name} belongs to {what}, which is not read here; {remedy}")


def unread(name: str, path: Path, config: ModelConfig, described: str) -> InputError:
    """Returns the error for a tensor that the model does not use. `described` names the source of the model's shape."""
    return InputError(
        f"{path}: tensor {name} belongs to no {config.family} model with {config.num_layers} layers, and leaving it out "
        f"would change the model; {described} and weights do not belong together"
    )
