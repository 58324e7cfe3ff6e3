"""GGUF files of small models, as llama.cpp's conversion writes them: by the package's own table of names."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
Kind = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: Kind = Kind.F32,
    alphabet: list[str] | None = None,
    architecture: str | None = None,
    leave_out: str = "",
    rope_factors: np.ndarray | None = None,
    fields: dict[str, Any] | None = None,
) -> None:
    """Writes transformers' `model` with its matrices stored as `kind`; of the k-quants, which the package can not make,
    random blocks.

    `alphabet` are the tokens of a byte-level tokenizer, "ab" and an end of text among them, `leave_out` a field that is
    not written, `fields` are further ones of text or number.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture or config.model_type)
    for name, value in (
        ("vocab_size", config.vocab_size),
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("rope_freq_base", config.rope_parameters["rope_theta"]),
    ):
        if name != leave_out:
            getattr(writer, f"add_{name}")(value)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for name, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    if alphabet:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(alphabet)
        writer.add_token_types([gguf.TokenType.NORMAL] * (len(alphabet) - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(len(alphabet) - 1)
        writer.add_bos_token_id(len(alphabet) - 1)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _interleaved(name, tensor, config).float().numpy()
        data, stored = _stored(values, kind if values.ndim > 1 else Kind.F32, rng)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp rotates dimensions 2i and 2i + 1 of Llama's heads together, where transformers rotates i and i + width
    / 2.
    """
    if config.model_type != "llama" or not any(f"self_attn.{each}_proj." in name for each in "qk"):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape)


def _stored(values: np.ndarray, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, Kind]:
    try:
        return gguf.quantize(values, kind), kind
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
        # The scales are half floats, first in the blocks of Q4_K and Q5_K, last in those of Q6_K: none may be NaN.
        scales = np.full((len(blocks), 2), 0.01, dtype=np.float16).view(np.uint8)
        blocks[:, :4], blocks[:, -2:] = scales, scales[:, :2]
        return blocks.reshape(*values.shape[:-1], -1), kind
