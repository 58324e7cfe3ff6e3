"""Small random models in Hugging Face form, made by transformers, with weights large enough that every layer
matters.
"""

from pathlib import Path
from typing import Any

import torch

LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 100,
    "bos_token_id": 100,
    "tie_word_embeddings": False,
}
# Qwen2 has no head_dim of its own; GPT-2's hidden size is its heads' width, which is odd here.
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_SHAPE,
    "mistral": LLAMA_SHAPE,
    "qwen2": {key: value for key, value in LLAMA_SHAPE.items() if key != "head_dim"},
    "qwen3": LLAMA_SHAPE,
    "gpt2": {
        "vocab_size": 101,
        "n_embd": 44,
        "n_inner": 90,
        "n_layer": 6,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "eos_token_id": 100,
        "bos_token_id": 100,
    },
    "mixtral": {**LLAMA_SHAPE, "intermediate_size": 38, "num_local_experts": 5, "num_experts_per_tok": 3},
    "qwen3_moe": {
        **LLAMA_SHAPE,
        "moe_intermediate_size": 22,
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [2],
    },
}
FAMILIES = tuple(_SHAPES)
WITH_EXPERTS = ("mixtral", "qwen3_moe")


def random_llama(folder: Path, *, seed: int = 0, confident: bool = False, **changes: Any) -> Any:
    """Saves a Llama of awkward shape into `folder` and returns it in evaluation mode. See `random_model`."""
    return random_model("llama", folder, seed=seed, confident=confident, **changes)


def random_model(family: str, folder: Path, *, seed: int = 0, confident: bool = False, **changes: Any) -> Any:
    """Saves a model of awkward shape into `folder` and returns it in evaluation mode; `changes` are keys of its
    configuration.

    `confident` makes output matrices large, its own and those of exits drawn at random for it: probabilities near 1
    occur.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **{**_SHAPES[family], **changes})
    # The grouped products that transformers prefers want widths of multiples of 16 bytes.
    plain = {"experts_implementation": "eager"} if family in WITH_EXPERTS else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **plain).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide one in the wrong place
                parameter.add_(0.2 * torch.randn_like(parameter))
        if confident:
            model.lm_head.weight.mul_(4)
            model.config.initializer_range = 0.6
    model.save_pretrained(folder)
    return model
