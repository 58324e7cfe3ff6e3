"""What a model's files hold beside what its config asks for: taken as transformers takes it, or named, never left out
in silence.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from exits import loaded_with
from megatron_files import save_legacy, save_stock_model
from random_models import random_llama, random_model
from refusals import refusal
from safetensors.torch import load_file, save_file

from ee_tuning import notices
from ee_tuning.artifact.inspect import model_facts
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import OpenModel, open_model
from ee_tuning.checkpoint.megatron import MegatronReader
from ee_tuning.checkpoint.verify import verify_folder
from ee_tuning.config import ModelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.export.export_huggingface import export_huggingface
from ee_tuning.export.megatron_writer import write_megatron
from ee_tuning.model_config.config import read_model_config


def opened(folder: Path) -> OpenModel:
    model = open_model(ModelSection(path=str(folder)))
    model.source.check_complete(model.config)
    return model


def edited(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def with_tensors(folder: Path, added: dict[str, torch.Tensor], *, without: str = "") -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != without}
    save_file({**kept, **added}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_output_matrix_of_its_own_is_the_one_that_speaks(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that was left saying tied beside a trained lm_head: the embedding was taken, and other tokens came out,
    without a word.
    """
    monkeypatch.setattr(notices, "_shown_lines", set())
    random_model(family, tmp_path / "model", tie_word_embeddings=False)
    edited(tmp_path / "model", tie_word_embeddings=True)
    assert not opened(tmp_path / "model").config.ties_embeddings
    assert "lm_head.weight in the files differs" in capsys.readouterr().err
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = torch.tensor([[3, 14, 15, 92, 6]])
    wanted = reference.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, 5:
    ].tolist()
    assert model_facts(tmp_path / "model")["shape"]["ties_embeddings"] is False and verify_folder(tmp_path / "model")
    config = load_config(None, {"model.path": str(tmp_path / "model")})
    export_huggingface(config, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    write_megatron(config, tmp_path / "megatron")
    prints = {
        fingerprint(model.source, model.config)
        for model in map(opened, (tmp_path / name for name in ("model", "hf", "megatron")))
    }
    assert len(prints) == 1
    for name in ("model", "hf"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert (
            theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, 5:
            ].tolist()
            == wanted
        )
    tokens = greedy(tmp_path / "model", prompt[0].tolist())
    assert tokens == wanted and greedy(tmp_path / "megatron", prompt[0].tolist()) == wanted


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    from decoding import decode

    loaded = loaded_with(folder)
    return decode(loaded, [prompt], 12, policy="full")[0].tokens


def test_a_copy_of_the_embedding_is_no_output_matrix_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tied model that stores both called untied: its exits would be refused by the same model without the copy."""
    random_llama(tmp_path, tie_word_embeddings=True)
    alone = fingerprint(*opened(tmp_path)[:2])
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(tmp_path, {"lm_head.weight": embedding.clone()})
    assert fingerprint(*opened(tmp_path)[:2]) == alone and not capsys.readouterr().err
    with_tensors(tmp_path, {"lm_head.weight": embedding.clone()}, without="model.embed_tokens.weight")
    assert fingerprint(*opened(tmp_path)[:2]) == alone  # transformers ties to whichever of the two is there


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_megatrons_own_output_matrix_speaks_too(tmp_path: Path, kind: str) -> None:
    """Saved arguments that say tied, beside an output layer that was trained by itself."""
    reference = random_llama(tmp_path / "hf")
    if kind == "legacy":
        save_legacy(
            reference,
            read_model_config(tmp_path / "hf"),
            tmp_path / "model",
            2,
            (3, 3),
            is_old=False,
            untie_embeddings_and_output_weights=False,
        )
    else:
        save_stock_model(str(tmp_path / "hf"), str(tmp_path / "model"), 1, 1, None, True)
        edited(tmp_path / "hf", tie_word_embeddings=True)
        (tmp_path / "model" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    model = opened(tmp_path / "model")
    assert not model.config.ties_embeddings
    assert torch.equal(model.source.rows("lm_head.weight", 0, 101), reference.lm_head.weight)


LORA = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_B.default.weight",
    "model.layers.1.mlp.up_proj.base_layer.weight",
]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, ["adapter", "merge_and_unload", name]) for name in LORA),
        ("model.layers.0.self_attn.q_proj.qweight", ["quantized", "bfloat16"]),
        ("score.weight", ["scores texts"]),
        ("model.visual.blocks.0.weight", ["reads more than text"]),
        ("model.layers.6.self_attn.q_proj.weight", ["6 layers"]),
        ("_orig_mod.model.norm.weight", ["torch.compile", "save the model inside"]),
        ("module.model.norm.weight", ["DDP", "model.module"]),
        ("something.else", ["something.else", "belongs to no llama"]),
    ],
)
def test_a_tensor_that_no_parameter_is_made_of_is_named(tmp_path: Path, name: str, words: list[str]) -> None:
    """Left-over LoRA tensors met with `config and weights do not belong together`."""
    random_llama(tmp_path)
    with_tensors(
        tmp_path, {name: torch.ones(2, 2)}, without="model.layers.1.mlp.up_proj.weight" if "base_layer" in name else ""
    )
    message = refusal(opened, tmp_path)
    assert all(word in message for word in ["model.safetensors", *words]), message


@pytest.mark.parametrize(
    ("key", "is_read_over"),
    [
        ("optimizer.state.exp_avg.decoder.final_layernorm.weight", True),
        ("chained_0.optimizer.state.exp_avg.x", True),
        ("mtp.layers.0.w", True),
        ("exits.3.norm.weight", True),
        ("decoder.layers.mlp.extra.weight", False),
        ("vision_model.w", False),
        ("something.else", False),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", False),
    ],
)
def test_what_lies_beside_a_megatron_model_is_known_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, is_read_over: bool
) -> None:
    """Only names that begin as a model's were looked at: all others were left out in silence."""
    monkeypatch.setattr(notices, "_shown_lines", set())
    random_llama(tmp_path / "hf")
    write_megatron(load_config(None, {"model.path": str(tmp_path / "hf")}), tmp_path / "model")
    source = opened(tmp_path / "model").source
    assert isinstance(source, MegatronReader)
    source.checkpoint.shapes[key] = (2,)
    if is_read_over:
        source.check_complete(source.config)
        assert ("mtp.layers.0.w" in capsys.readouterr().err) == key.startswith("mtp.")
        return
    with pytest.raises(InputError) as error:
        source.check_complete(source.config)
    assert key in str(error.value) and ("merge_and_unload" in str(error.value)) == ("adapter" in key)


def test_buffers_of_old_versions_change_nothing(tmp_path: Path) -> None:
    """Frequencies that transformers once saved, taken for tensors of another model."""
    random_llama(tmp_path)
    wanted = fingerprint(*opened(tmp_path)[:2])
    with_tensors(
        tmp_path,
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5), "model.rotary_emb.inv_freq": torch.ones(5)},
    )
    assert fingerprint(*opened(tmp_path)[:2]) == wanted


def test_an_adapters_files_are_told(tmp_path: Path) -> None:
    """transformers loads the base model and the adapter; here the adapter was left out, or the folder called no model
    at all.
    """
    random_llama(tmp_path / "model")
    for folder, words in (
        (tmp_path / "model", ["beside a model", "move the adapter's files away"]),
        (tmp_path / "bare", ["and no model"]),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        (folder / "adapter_model.safetensors").touch()
        message = refusal(opened, folder)
        assert all(
            word in message
            for word in ["adapter_config.json, adapter_model.safetensors, made for org/base", "peft", *words]
        )


def test_a_model_without_its_first_prefix_is_the_same(tmp_path: Path) -> None:
    """Embedding models of Qwen3: no `model.` before a name. And those that have no output matrix at all say what they
    are.
    """
    random_model("qwen3", tmp_path / "whole", tie_word_embeddings=True)
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    edited(tmp_path / "bare", architectures=["Qwen3ForCausalLM"])
    assert fingerprint(*opened(tmp_path / "bare")[:2]) == fingerprint(*opened(tmp_path / "whole")[:2])
    edited(tmp_path / "bare", tie_word_embeddings=False)
    assert "no output matrix (lm_head.weight)" in refusal(opened, tmp_path / "bare")
