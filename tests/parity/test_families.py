"""Each model family is the model that transformers loads: the backbone's logits, and decoding with exits."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from decoding import decode
from exits import write_exits
from plain_decoder import PlainDecoder
from random_models import FAMILIES, random_model

from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.model.config import read_model_config
from ee_tuning.parallel.topology import init_parallel

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
    model = load_for_generation(load_config(None, {"model.path": str(folder)}), init_parallel(ParallelSection())).model
    with torch.no_grad():
        hidden, _ = model.run_layers(model.embed(tokens))
        logits = F.linear(model.final_hidden(hidden), model.backbone.output_layer.weight).transpose(0, 1)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=0, atol=1e-4)


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

    reference = random_model("gpt2", tmp_path, n_inner=None)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors.update({f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(6)})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "n_inner", "tie_word_embeddings", "add_cross_attention", "scale_attn_weights"):
        raw.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "n_ctx": 128}))
    assert_same_logits(tmp_path, reference)


PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]


@pytest.mark.parametrize(("architecture", "init"), [  # drawn biases are 0
    ("embedding", "copy"), ("norm", "random"), ("mlp", "random"), ("mlp", "copy"),
    (["layer", "adapter"], "random"), (["adapter", "layer"], "copy")])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_plain_decoder(tmp_path, family, architecture, init):
    """The lean layer of a decode step, or a head, that leaves out what this family has and Llama has not; positions off by one."""
    reference = random_model(family, tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=architecture, init=init)
    plain = PlainDecoder(reference, exits, (2, 4), torch.float64)
    config = load_config(None, {"model.path": str(tmp_path / "model"), "exits.path": str(exits), "model.dtype": "float64"})
    loaded = load_for_generation(config, init_parallel(ParallelSection()))
    got = [(said.tokens, said.exit_layers) for said in decode(loaded, PROMPTS, 16, engine={"max_pending": 5}, threshold=0.6)]
    assert len({layer for _, layers in got for layer in layers}) > 1, "the claim is empty where every token leaves at the same place"
    assert got == [plain.decode(prompt, 16, 0.6) for prompt in PROMPTS]


REFUSED = [
    ("llama", {"model_type": "gemma"}, ["model_type must be one of llama, mistral", "gemma"]),
    ("llama", {"attention_bias": True}, ["attention_bias = True", "must be False"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias = True"]),
    ("mistral", {"sliding_window": 127}, ["sliding_window = 127", "max_position_embeddings = 128", "lower max_position_embeddings"]),
    ("mistral", {"max_position_embeddings": 8192, "sliding_window": ...}, ["sliding_window = 4096"]),
    ("qwen2", {"layer_types": ..., "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5}, ["sliding_window = 16"]),
    ("qwen3", {"layer_types": ["full_attention"] * 5 + ["sliding_attention"], "sliding_window": 16}, ["sliding_window = 16"]),
    ("qwen3", {"layer_types": ["full_attention"] * 5 + ["linear_attention"]}, ["layer_types", "linear_attention"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx = True"]),
    ("gpt2", {"activation_function": "tanh"}, ["activation must be one of silu", "tanh"]),
    ("gpt2", {"n_embd": ...}, ["n_embd must be a positive whole number", "None"]),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_would_be_ignored_is_refused(tmp_path, family, changes, named):
    """A window or a bias that is read over gives another model, without an error."""
    random_model(family, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    read_model_config(tmp_path)
    changed = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError) as caught:
        read_model_config(tmp_path)
    for words in ["config.json", *named]:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
