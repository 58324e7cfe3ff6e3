"""Each model family is the model that transformers loads: the backbone, decoding with exits, every layout, and tuning."""
import json
from pathlib import Path

import pytest
import torch
from random_models import FAMILIES, random_model
from test_backbone import our_logits

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("mistral", {"sliding_window": 128, "head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 37}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 6}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": None, "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"activation_function": "gelu"}), ("gpt2", {"activation_function": "relu", "n_head": 1}),
]


def assert_same_logits(folder: Path, reference: torch.nn.Module) -> None:
    tokens = torch.randint(0, 100, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(folder, tokens), reference(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_equal_transformers(tmp_path, family, changes):
    """A bias or a norm left out, a fused matrix cut at the wrong place, another activation."""
    assert_same_logits(tmp_path, random_model(family, tmp_path, **changes))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_old_spelling_is_read(tmp_path, family):
    """Folders written before transformers 5 say rope_theta and torch_dtype, and leave layer_types out."""
    reference = random_model(family, tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(torch_dtype=raw.pop("dtype"), rope_theta=raw.pop("rope_parameters")["rope_theta"])
    raw.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same_logits(tmp_path, reference)


def test_published_gpt2_is_read(tmp_path):
    """The published folders hold no `transformer.` before a name, carry masks as tensors, and say n_ctx and no dtype."""
    from safetensors.torch import load_file, save_file

    reference = random_model("gpt2", tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors.update({f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(6)})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "n_inner", "tie_word_embeddings", "add_cross_attention", "scale_attn_weights"):
        raw.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "n_ctx": 128}))
    assert_same_logits(tmp_path, reference)
