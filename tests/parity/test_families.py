"""Each model family is the model that transformers loads: the backbone's logits, and decoding with exits."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from decoding import decode, full_logits
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import FAMILIES, WITH_EXPERTS, random_model

from ee_tuning.artifact.inspect import model_facts
from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.export.megatron_writer import write_megatron
from ee_tuning.kernel import calls
from ee_tuning.model_config.config import model_config_from_hf, read_model_config
from ee_tuning.model_config.huggingface_config import huggingface_config

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
}

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("mistral", {"sliding_window": 128, "head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 37}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 6}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": None, "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"activation_function": "relu", "n_head": 1}),
    ("mixtral", {"num_experts_per_tok": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"num_experts_per_tok": 1, "mlp_only_layers": None}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen3_moe", {"attention_bias": True}),
    ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}}),
    ("llama", {"max_position_embeddings": 512, "rope_parameters": {**LONGROPE, "attention_factor": None}}),
    ("qwen3", {"rope_parameters": {**LONGROPE, "factor": 3.0}}),
]


def assert_same_logits(
    folder: Path, reference: torch.nn.Module, dtype: str = "float32", tolerance: float = 1e-4
) -> None:
    tokens = torch.randint(0, 100, (2, 128), generator=torch.Generator().manual_seed(1))
    model = loaded_with(folder, dtype=dtype).model
    with torch.no_grad():
        torch.testing.assert_close(full_logits(model, tokens), reference(tokens).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_equal_transformers(tmp_path, family, changes):
    """A bias or a norm left out, a fused matrix cut at the wrong place, another activation."""
    assert_same_logits(tmp_path, random_model(family, tmp_path, **changes))


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_logits_of_experts_equal_transformers_in_float64(tmp_path, family):
    """A router or a sum over experts that works in a type of its own. transformers takes norms and softmax in float32
    even here.
    """
    assert_same_logits(tmp_path, random_model(family, tmp_path).double(), "float64", 5e-5)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_packed_experts_are_the_same_model(tmp_path, family):
    """Halves of a pack taken for each other, an expert for its neighbour; exits that are refused on the other form."""
    reference = random_model(family, tmp_path / "alone")
    reference.save_pretrained(tmp_path / "packed", save_original_format=False, max_shard_size="60KB")
    assert_same_logits(tmp_path / "packed", reference)
    alone, packed = (model_facts(tmp_path / form) for form in ("alone", "packed"))
    assert alone["fingerprint"] == packed["fingerprint"] and alone["parameters"] == packed["parameters"]
    assert packed["parameters"]["all"] == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_old_spelling_is_read(tmp_path, family):
    """Folders written before transformers 5 say rope_theta and torch_dtype, and leave layer_types out."""
    reference = random_model(family, tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.update(torch_dtype=raw.pop("dtype"), rope_theta=raw.pop("rope_parameters")["rope_theta"])
    raw.pop("layer_types", None)
    if family == "qwen3_moe":
        raw["num_experts"] = raw.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same_logits(tmp_path, reference)


def test_published_gpt2_is_read(tmp_path):
    """The published folders hold no `transformer.` before a name, carry masks as tensors, and say n_ctx and no
    dtype.
    """
    from safetensors.torch import load_file, save_file

    reference = random_model("gpt2", tmp_path, n_inner=None)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    tensors.update({f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(6)})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("dtype", "n_inner", "tie_word_embeddings", "add_cross_attention", "scale_attn_weights"):
        raw.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "n_ctx": 128}))
    assert_same_logits(tmp_path, reference)


PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]


HEADS = [
    ("embedding", "copy"),
    ("norm", "random"),
    ("mlp", "random"),
    ("mlp", "copy"),  # drawn biases are 0
    (["layer", "adapter"], "random"),
    (["adapter", "layer"], "copy"),
]


@pytest.mark.parametrize(
    ("family", "architecture", "init"),
    [(family, *head) for family in FAMILIES for head in HEADS if head[0] != "mlp" or family not in WITH_EXPERTS],
)
def test_decoding_equals_the_plain_decoder(tmp_path, monkeypatch, family, architecture, init):
    """The lean layer of a decode step, or a head, that leaves out what this family has and Llama has not; positions off
    by one. By the kernels, and by torch's operators where there are none.
    """
    reference = random_model(family, tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=architecture, init=init)
    plain = PlainDecoder(reference, exits, (2, 4), torch.float64)
    loaded = loaded_with(tmp_path / "model", exits, dtype="float64")
    got = [
        (said.tokens, said.exit_layers)
        for said in decode(loaded, PROMPTS, 16, engine={"max_pending": 5}, threshold=0.6)
    ]
    assert len({layer for _, layers in got for layer in layers}) > 1, (
        "the claim is empty where every token leaves at the same place"
    )
    assert got == [plain.decode(prompt, 16, 0.6) for prompt in PROMPTS]
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    assert got == [
        (said.tokens, said.exit_layers)
        for said in decode(loaded, PROMPTS, 16, engine={"max_pending": 5}, threshold=0.6)
    ]


@pytest.mark.parametrize("is_native", [True, False])
def test_decoding_with_a_bias_of_attention_equals_the_plain_decoder(tmp_path, monkeypatch, is_native):
    """The bias of the attention's output left out by the kernels, or by the layer of an exit."""
    if not is_native:
        monkeypatch.setattr(calls, "kernels", lambda *_: None)
    reference = random_model("qwen3", tmp_path / "model", confident=True, attention_bias=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=["layer", "adapter"], init="random")
    plain = PlainDecoder(reference, exits, (2, 4), torch.float64)
    loaded = loaded_with(tmp_path / "model", exits, dtype="float64")
    got = [
        (said.tokens, said.exit_layers)
        for said in decode(loaded, PROMPTS, 16, engine={"max_pending": 5}, threshold=0.6)
    ]
    assert got == [plain.decode(prompt, 16, 0.6) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"max_position_embeddings": 512, "rope_parameters": LONGROPE},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_a_megatron_export_is_the_same_model(tmp_path, changes):
    """A bias or frequencies that Megatron's arguments have no word for, lost on the way through its format."""
    reference = random_model("llama", tmp_path / "model", **changes)
    write_megatron(load_config(None, {"model.path": str(tmp_path / "model")}), tmp_path / "megatron")
    assert_same_logits(tmp_path / "megatron", reference)
    config = read_model_config(tmp_path / "model")
    assert model_config_from_hf(huggingface_config(config), tmp_path / "config.json") == config


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_a_threshold_above_one_gives_what_transformers_generates(tmp_path, family):
    """A decode step that routes a token otherwise than a pass over the whole sequence does."""
    reference = random_model(family, tmp_path / "model", confident=True).double()
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="norm", init="copy")
    loaded = loaded_with(tmp_path / "model", exits, dtype="float64")
    got = [
        prompt + said.tokens for prompt, said in zip(PROMPTS, decode(loaded, PROMPTS, 20, threshold=1.1), strict=True)
    ]
    plain = transformers.GenerationConfig(max_new_tokens=20, do_sample=False)
    wanted = [
        reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=plain)[
            0
        ].tolist()
        for prompt in PROMPTS
    ]
    assert [tokens[: len(told)] for tokens, told in zip(got, wanted, strict=True)] == wanted
    assert len({token for tokens in wanted for token in tokens}) > 20 and max(map(len, wanted)) > 20


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_mlp_heads_are_refused_on_experts(tmp_path, family):
    """Heads that copy one MLP of a layer that has many."""
    random_model(family, tmp_path / "model")
    with pytest.raises(InputError, match=r"architecture must not be mlp .* experts, .* --architecture norm") as caught:
        write_exits(tmp_path / "model", tmp_path / "exits", architecture="mlp", init="random")
    assert "\n" not in str(caught.value) and not (tmp_path / "exits").exists()


REFUSED = [
    ("llama", {"model_type": "gemma"}, ["model_type must be one of llama, mistral", "gemma"]),
    ("llama", {"mlp_bias": True}, ["mlp_bias = True", "must be False"]),
    (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 5}},
        ["short_factor", "5 positive numbers", "got 4"],
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 5}},
        ["longrope needs long_factor"],
    ),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, ["dynamic or longrope, got proportional"]),
    (
        "mistral",
        {"sliding_window": 127},
        ["sliding_window = 127", "max_position_embeddings = 128", "lower max_position_embeddings"],
    ),
    ("mistral", {"max_position_embeddings": 8192, "sliding_window": ...}, ["sliding_window = 4096"]),
    (
        "qwen2",
        {"layer_types": ..., "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
        ["sliding_window = 16"],
    ),
    (
        "qwen3",
        {"layer_types": ["full_attention"] * 5 + ["sliding_attention"], "sliding_window": 16},
        ["sliding_window = 16"],
    ),
    ("qwen3", {"layer_types": ["full_attention"] * 5 + ["linear_attention"]}, ["layer_types", "linear_attention"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx = True"]),
    ("gpt2", {"activation_function": "tanh"}, ["activation must be one of silu", "tanh"]),
    ("gpt2", {"n_embd": ...}, ["n_embd must be a positive whole number", "None"]),
    ("mixtral", {"sliding_window": 64}, ["sliding_window = 64"]),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, ["sliding_window = 64"]),
    ("qwen3_moe", {"shared_expert_intermediate_size": 20}, ["shared_expert_intermediate_size = 20"]),
    ("qwen3_moe", {"num_experts": 8}, ["num_experts = 8", "num_local_experts = 7", "must be the same"]),
    ("qwen3_moe", {"num_experts_per_tok": 8}, ["num_experts_per_tok must be at most num_experts = 7", "got 8"]),
    ("qwen3_moe", {"moe_intermediate_size": None}, ["moe_intermediate_size must be a positive whole number"]),
    *(
        (
            "qwen3_moe",
            {"mlp_only_layers": listed},
            ["mlp_only_layers must be a list of whole numbers in 0..5", f"got {listed!r}"],
        )
        for listed in (["1"], [6], [-1], [True], 2, {"1": 2})
    ),
    ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step must be a positive whole number"]),
    ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok", "at least 2"]),
]


def test_keys_of_another_family_are_read_no_more_than_transformers_reads_them(tmp_path):
    """A Mixtral's config.json with a Qwen's keys, which makes layers without experts, or experts of another width."""
    random_model("mixtral", tmp_path)
    wanted = read_model_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    strange = {"mlp_only_layers": [1], "decoder_sparse_step": 2, "moe_intermediate_size": 8, "norm_topk_prob": False}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **strange}))
    assert read_model_config(tmp_path) == wanted
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].state_dict()
    assert theirs["mlp.experts.down_proj"].shape == (wanted.num_experts, wanted.hidden_size, wanted.moe_ffn_hidden_size)


@pytest.fixture(scope="module")
def config_files(tmp_path_factory):
    """Family -> what its config.json holds, which is read without an error."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        random_model(family, folder / family)
        read_model_config(folder / family)
    return {family: json.loads((folder / family / "config.json").read_text()) for family in FAMILIES}


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_what_would_be_ignored_is_refused(tmp_path, config_files, family, changes, named):
    """A window or a bias that is read over gives another model, without an error."""
    changed = {key: value for key, value in {**config_files[family], **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError) as caught:
        read_model_config(tmp_path)
    for words in ["config.json", *named]:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
