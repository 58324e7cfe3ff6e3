"""The backbone is the model that transformers loads: the same logits from Megatron's layers."""

from pathlib import Path

import pytest
import torch
from decoding import full_logits
from exits import loaded_with
from random_models import random_llama

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-spelled-out": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
}
SHAPES = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "no groups": {"num_key_value_heads": 4},
    "one key head, odd width": {
        "num_key_value_heads": 1,
        "intermediate_size": 37,
        "vocab_size": 67,
        "eos_token_id": 1,
        "bos_token_id": 1,
    },
}


def our_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:  # [b, s] -> [b, s, v]
    return full_logits(loaded_with(folder).model, tokens)


@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers_for_each_rope_scaling(tmp_path, rope):
    """A frequency or an attention factor off by a little shows only far from the first position."""
    reference = random_llama(tmp_path, rope_parameters={"rope_theta": 5000.0, **ROPES[rope]})
    tokens = torch.randint(0, 100, (2, 128))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path, tokens), reference(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_for_awkward_shapes(tmp_path, shape):
    """Fused projections split at the wrong row; a tied matrix read from the wrong place."""
    reference = random_llama(tmp_path, **SHAPES[shape])
    tokens = torch.randint(0, 60, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path, tokens), reference(tokens).logits, rtol=0, atol=1e-4)


def test_old_spelling_of_config_is_read(tmp_path):
    """Folders written before transformers 5 say rope_theta, rope_scaling and torch_dtype."""
    import json

    rope = {"rope_theta": 5000.0, **ROPES["llama3"]}
    reference = random_llama(tmp_path, rope_parameters=rope)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw.update(torch_dtype=raw.pop("dtype"), rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = torch.randint(0, 100, (1, 128))
    with torch.no_grad():
        torch.testing.assert_close(our_logits(tmp_path, tokens), reference(tokens).logits, rtol=0, atol=1e-4)


def test_shipped_model_equals_transformers():
    """The model the README begins with must be the one transformers loads."""
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    tokens = tokenizer("def main():\n    parser = argparse.ArgumentParser()\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(our_logits(SHIPPED, tokens), reference(tokens).logits, rtol=0, atol=1e-4)
