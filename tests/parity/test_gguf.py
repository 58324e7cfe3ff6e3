"""A GGUF file is the model that transformers reads from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from decoding import full_logits
from exits import loaded_with
from gguf_files import Kind, write_gguf
from random_models import random_model

from ee_tuning import cli
from ee_tuning.artifact.inspect import model_facts
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import ModelSection
from ee_tuning.model_config.gguf_config import llama3_factors

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
    "eos_token_id": 95,
    "bos_token_id": 95,
}


QWEN3 = {"head_dim": 128}  # transformers takes no other width from a GGUF file of Qwen3


def theirs(path: Path) -> torch.nn.Module:
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(
    ("family", "kind", "ties"),
    [
        ("llama", Kind.F32, False),
        ("llama", Kind.Q4_1, True),
        ("llama", Kind.Q6_K, False),
        ("qwen2", Kind.Q8_0, True),
        ("qwen2", Kind.Q5_K, False),
        ("qwen3", Kind.Q4_0, False),
        ("qwen3", Kind.Q4_K, True),
        ("qwen3", Kind.BF16, False),
        ("llama", Kind.F16, True),
    ],
)
def test_tensors_and_logits_equal_transformers(tmp_path: Path, family: str, kind: Kind, ties: bool) -> None:
    """Heads whose halves are left interleaved, a block format read by another's rule, a bias left out: fluent
    nonsense.
    """
    path = tmp_path / "model.gguf"
    shape = {**SHAPE, **(QWEN3 if family == "qwen3" else {}), "tie_word_embeddings": ties}
    write_gguf(path, random_model(family, tmp_path / "hf", **shape), kind=kind)
    reference = theirs(path)
    state = reference.state_dict()
    with open_model(ModelSection(path=str(path))).source as source:
        for name in source.names():
            whole = source.full(name).float()
            assert torch.equal(whole, state[name]), name
            assert torch.equal(source.rows(name, 3, 9).float(), whole[3:9])
            assert whole.dim() == 1 or torch.equal(source.columns(name, 5, 38).float(), whole[:, 5:38])
    tokens = torch.randint(0, 95, (2, 32), generator=torch.Generator().manual_seed(1))
    model = loaded_with(path, dtype="float32").model
    with torch.no_grad():
        torch.testing.assert_close(full_logits(model, tokens), reference(tokens).logits, rtol=1e-5, atol=1e-3)


def test_it_has_the_fingerprint_of_its_folder(tmp_path: Path) -> None:
    """Exits made for a folder that do not fit the same model as one file."""
    write_gguf(tmp_path / "model.gguf", random_model("llama", tmp_path / "hf", **SHAPE))
    assert model_facts(tmp_path / "model.gguf")["fingerprint"] == model_facts(tmp_path / "hf")["fingerprint"]


def test_an_export_is_the_same_model_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a tokenizer, or one whose config loads another model."""
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    alphabet = [*map(chr, range(33, 126)), "ab", "ba", "<end>"]
    write_gguf(path, random_model("qwen3", tmp_path / "hf", **{**SHAPE, **QWEN3}), kind=Kind.Q8_0, alphabet=alphabet)
    assert cli.main(["export", "--format", "hf", "--model", str(path), "--output", str(out)]) == 0
    tokens = torch.randint(0, 95, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(exported(tokens).logits, theirs(path)(tokens).logits, rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<end>") == tokenizer.eos_token_id == exported.config.eos_token_id == 95
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_llama_3s_frequencies_are_told_by_their_tensor(tmp_path: Path) -> None:
    """A long context read with the frequencies of a short one: fluent at first, and lost after some thousand tokens."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = random_model("llama", tmp_path / "hf", **SHAPE, rope_parameters={**scaling, "rope_theta": 500000.0})
    inverse, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = plain / inverse.double().numpy()
    np.testing.assert_allclose(llama3_factors(scaling, 500000.0, 64), factors, rtol=1e-5)
    write_gguf(tmp_path / "model.gguf", model, rope_factors=factors)
    assert (
        open_model(ModelSection(path=str(tmp_path / "model.gguf"))).config.rope
        == open_model(ModelSection(path=str(tmp_path / "hf"))).config.rope
    )
