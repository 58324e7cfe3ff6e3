"""Small random Llamas in Hugging Face form, made by transformers, with weights large enough that every layer matters."""
from pathlib import Path
from typing import Any

import torch


def random_llama(folder: Path, *, seed: int = 0, confident: bool = False, **changes: Any) -> Any:
    """Saves a model of awkward shape into `folder` and returns it in evaluation mode.

    `confident` makes output matrices large, its own and those of exits drawn at random for it: probabilities near 1 occur.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shape: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 128, "initializer_range": 0.2,
        "eos_token_id": 100, "bos_token_id": 100, "tie_word_embeddings": False}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones would hide a norm in the wrong place
                parameter.add_(0.2 * torch.randn_like(parameter))
        if confident:
            model.lm_head.weight.mul_(4)
            model.config.initializer_range = 0.6
    model.save_pretrained(folder)
    return model
