"""An exit exported as a plain model: transformers' own class says what our exit says, and drafts for the whole one."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from exits import loaded_with, write_exits
from random_models import WITH_EXPERTS, random_llama, random_model
from safetensors.torch import load_file, save_file

from ee_tuning import cli
from ee_tuning.artifact.tried_engines import TRIED
from ee_tuning.export import export_draft
from ee_tuning.export.check import exit_logits
from ee_tuning.model_config.families import Family
from ee_tuning.storage.manifest import write_manifest

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
IDS = torch.tensor([[5, 17, 80, 3, 9, 41, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64, 99, 1, 0, 44]])


def export(*words: str | Path | int, kind: str = "draft", code: int = 0) -> None:
    assert cli.main(["export", "--format", kind, *map(str, words)]) == code


def plain(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    experts = json.loads((folder / "config.json").read_text())["model_type"] in WITH_EXPERTS
    more = {"experts_implementation": "eager"} if experts else {}  # the other one has no float64
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=False, **more
    )


def ours(model: Path, exits: Path, layer: int) -> torch.Tensor:  # [s, v]
    return exit_logits(loaded_with(model, exits, dtype="float64"), IDS)[layer]


def randomize(exits: Path, part: str) -> None:
    """Draws the artifact's tensors whose names hold `part` anew: what begins as zeros or ones would hide a mistake."""
    torch.manual_seed(7)
    tensors = load_file(exits / "exit_heads.safetensors")
    for name, tensor in tensors.items():
        if part in name:
            tensor.add_(0.2 * torch.randn_like(tensor))
    save_file(tensors, exits / "exit_heads.safetensors", metadata={"format": "pt"})
    write_manifest(exits)


KINDS = [
    ("llama", "norm", "untied", {}),
    ("llama", "norm", "tied", {"tie_word_embeddings": True}),
    ("llama", "mlp", "tied", {}),
    ("llama", "linear", "tied", {"tie_word_embeddings": True}),
    ("llama", "layer", "untied", {"attention_bias": True}),
    ("mistral", "norm", "untied", {}),
    ("mistral", "linear", "tied", {}),
    ("mistral", "mlp", "untied", {}),
    ("mistral", "layer", "tied", {}),
    ("qwen2", "norm", "tied", {}),
    ("qwen2", "mlp", "tied", {}),
    ("qwen2", "layer", "untied", {"layer_types": ["full_attention"] * 6}),
    ("qwen2", "linear", "untied", {}),
    ("qwen3", "norm", "untied", {}),
    ("qwen3", "linear", "untied", {}),
    ("qwen3", "mlp", "untied", {}),
    ("qwen3", "layer", "tied", {}),
    ("gpt2", "norm", "untied", {}),
    ("gpt2", "linear", "tied", {}),
    ("gpt2", "mlp", "tied", {}),
    ("gpt2", "layer", "untied", {}),
    ("mixtral", "norm", "tied", {}),
    ("mixtral", "linear", "untied", {}),
    ("mixtral", "layer", "untied", {}),
    ("qwen3_moe", "norm", "untied", {}),
    ("qwen3_moe", "linear", "tied", {}),
    ("qwen3_moe", "layer", "tied", {}),
    ("qwen3_moe", "layer", "untied", {"mlp_only_layers": [5]}),
]


def test_every_family_is_there_with_every_kind():
    """A family that cards and docs call tried with each kind, and that lacks one."""
    dense = {(family, kind) for family in get_args(Family) for kind in ("norm", "linear", "mlp", "layer")}
    assert {(family, kind) for family, kind, *_ in KINDS} == dense - {(family, "mlp") for family in WITH_EXPERTS}


@pytest.mark.parametrize(
    ("family", "architecture", "output", "changes"), KINDS, ids=["-".join([*k[:3], *k[3]]) for k in KINDS]
)
def test_the_plain_model_says_what_the_exit_says_and_drafts(tmp_path, family, architecture, output, changes):
    """A layer too many, a norm of the backbone's, a map that is not folded, a draft that changes what is said."""
    whole = random_model(family, tmp_path / "model", confident=True, **changes)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=architecture, output=output)
    randomize(exits, "norm.")
    if family == "gpt2":
        randomize(exits, "linear.")
    export("--model", tmp_path / "model", "--exits", exits, "--exit", 4, "--output", tmp_path / "draft")
    assert cli.main(["verify", str(tmp_path / "draft")]) == 0
    draft, whole = plain(tmp_path / "draft"), plain(tmp_path / "model")
    with torch.no_grad():
        said = draft(IDS).logits[0]
    torch.testing.assert_close(said, ours(tmp_path / "model", exits, 4), rtol=0, atol=1e-4)
    keys = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    drafted = whole.generate(IDS, attention_mask=mask, assistant_model=draft, **keys)
    assert drafted.tolist() == whole.generate(IDS, attention_mask=mask, **keys).tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder / "model").to(torch.bfloat16).save_pretrained(folder / "model")
    write_exits(folder / "model", folder / "exits")
    tree = json.loads((folder / "model" / "config.json").read_text())
    classes = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}
    (folder / "model" / "config.json").write_text(
        json.dumps({**tree, "auto_map": classes, "early_exit": {"files": []}})
    )
    (folder / "model" / "generation_config.json").write_text('{"temperature": 0.7}')
    (folder / "model" / "LICENSE").write_text("as you like")
    return folder


def test_what_comes_along(llama, tmp_path):
    """Tensors in another type, a class that asks for code, generation defaults or a licence left behind."""
    words = ("--model", llama / "model", "--exits", llama / "exits", "--exit", 2)
    export(*words, "--output", tmp_path / "draft")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    backbone = load_file(llama / "model" / "model.safetensors")
    same = [name for name in tensors if name in backbone and torch.equal(tensors[name], backbone[name])]
    assert len(same) == len(tensors) - 5, "all but the exit's norm, output matrix and MLP"
    made = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert made["auto_map"] == {"AutoTokenizer": ["tokenization_own.Own", None]} and "early_exit" not in made
    assert (made["num_hidden_layers"], made["tie_word_embeddings"], made["dtype"]) == (2, False, "bfloat16")
    for name in ("generation_config.json", "LICENSE"):
        assert (tmp_path / "draft" / name).read_bytes() == (llama / "model" / name).read_bytes()
    export(*words, "--output", tmp_path / "pruned", kind="pruned")
    names = {path.name for path in (tmp_path / "draft").iterdir()}
    assert names == {path.name for path in (tmp_path / "pruned").iterdir()}
    differing = {n for n in names if (tmp_path / "draft" / n).read_bytes() != (tmp_path / "pruned" / n).read_bytes()}
    assert differing == {"README.md", "manifest.json"}


def test_the_card_tells_what_was_tried(llama, tmp_path):
    """Commands for engines that nobody has run, without a word of it."""
    export("--model", llama / "model", "--exits", llama / "exits", "--exit", 2, "--output", tmp_path / "draft")
    card = (tmp_path / "draft" / "README.md").read_text()
    versions = [tried.version for tried in TRIED.values()]
    for word in ("draft_model", "STANDALONE", "Draft_Target", "draft-simple", "assistant_model", *versions):
        assert word in card
    assert card.count("Not tried") == 2


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2"])
def test_the_card_claims_no_engine_for_a_family_that_was_not_tried_there(tmp_path, family):
    """A GPT-2 that is said to have drafted in vLLM, because a Llama has."""
    random_model(family, tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="norm")
    for kind in ("draft", "pruned"):
        export("--model", tmp_path / "model", "--exits", exits, "--exit", 2, "--output", tmp_path / kind, kind=kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert f"Tried with transformers {TRIED['transformers'].version}." in card
        assert "Tried with vLLM" not in card and "Tried with llama.cpp" not in card
        assert card.count(f"Not tried with a `{family}`") == (2 if kind == "draft" else 1)


def test_a_pruned_folders_card_tells_which_server_was_tried(llama, tmp_path):
    """Commands of two servers, of which one was never run."""
    words = ("--model", llama / "model", "--exits", llama / "exits", "--exit", 2, "--output", tmp_path / "pruned")
    export(*words, kind="pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"Tried with vLLM {TRIED['vLLM'].version}. SGLang was not tried." in card


def test_a_megatron_checkpoint_makes_the_same_draft(llama, tmp_path):
    """A draft that depends on how the model is stored; commands in its card that hand a checkpoint to an engine."""
    random_llama(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="layer")
    assert (
        cli.main(
            ["export", "--format", "megatron", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "meg")]
        )
        == 0
    )
    for name in ("model", "meg"):
        export("--model", tmp_path / name, "--exits", exits, "--exit", 4, "--output", tmp_path / f"draft_{name}")
        card, word = (tmp_path / f"draft_{name}" / "README.md").read_text(), {"model": "model", "meg": "MODEL_FOLDER"}
        assert f"vllm serve {word[name]} --spec" in card
        assert ("`ee-tuning export --format hf --model meg --output MODEL_FOLDER`" in card) == (name == "meg")
    files = [tmp_path / f"draft_{name}" / "model.safetensors" for name in ("model", "meg")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("exits", "words", "named"),
    [
        ({}, ["--exit", "3"], ["2, 4", "got 3", "--exit 2"]),
        ({}, [], ["2, 4", "got none"]),
        ({"architecture": "adapter"}, ["--exit", "2"], ["adapter", "bottleneck", "layer 2"]),
        ({"architecture": "embedding"}, ["--exit", "2"], ["embedding", "no norm", "layer 2"]),
        ({"listed": range(0, 101, 3)}, ["--exit", "2"], ["101", "34", "d2t", "--output-vocab"]),
        (
            {"architecture": "linear", "bias": True},
            ["--exit", "2"],
            ["bias", "layer 2", "--fold-bias", "--exit-output untied"],
        ),
        ({}, ["--exit", "2", "--link"], ["--link"]),
        ({}, ["--exit", "2", "--fold-bias", "--tokenizer", str(SHIPPED)], ["--fold-bias", "layer 2"]),
        (None, ["--exit", "2"], ["--exits"]),
    ],
    ids=["no_such_exit", "no_exit", "adapter", "embedding", "shortlist", "bias", "link", "no_map", "no_exits"],
)
def test_an_exit_that_is_no_plain_model_is_refused(llama, tmp_path, capsys, exits, words, named):
    """A folder that loads and says something else than the exit."""
    given: list[str | Path] = []
    if exits is not None:
        has_bias = exits.get("bias", False)
        kinds = {key: value for key, value in exits.items() if key != "bias"}
        given = ["--exits", write_exits(llama / "model", tmp_path / "exits", **kinds)]
        if has_bias:
            randomize(tmp_path / "exits", "linear.bias")
    export("--model", llama / "model", *given, *words, "--output", tmp_path / "draft", code=2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in said for word in named) and said.startswith("ee-tuning: error"), said
    assert not (tmp_path / "draft").exists()


def test_the_check_finds_a_difference(tmp_path, capsys, monkeypatch):
    """A check that can not fail."""
    exits = write_exits(SHIPPED, tmp_path / "exits", exit_layers=[3], init="copy", architecture="norm", output="tied")
    words = ("--model", SHIPPED, "--exits", exits, "--exit", 3, "--output", tmp_path / "draft", "--check")
    export(*words)
    assert "exit after layer 3: largest logit difference" in capsys.readouterr().out
    right = export_draft.plain_exit

    def wrong(*given: Any) -> Any:
        made = right(*given)
        norms = ("input_layernorm", "post_attention_layernorm")
        made.origins[f"model.layers.2.{norms[0]}.weight"] = f"model.layers.2.{norms[1]}.weight"
        return made

    monkeypatch.setattr(export_draft, "plain_exit", wrong)
    export(*words, "--overwrite", code=1)
    assert "above the tolerance of 0.0001" in capsys.readouterr().out


def test_a_folded_map_of_16_bits_is_within_its_rounding(tmp_path, capsys):
    """A check that calls a fold wrong for being rounded to the type that the matrix has."""
    model = tmp_path / "model"
    random_llama(model, vocab_size=300).to(torch.bfloat16).save_pretrained(model)
    for path in SHIPPED.glob("tokenizer*"):
        shutil.copyfile(path, model / path.name)
    exits = write_exits(model, tmp_path / "exits", architecture="linear", output="tied")
    export("--model", model, "--exits", exits, "--exit", 4, "--output", tmp_path / "draft", "--check")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


def test_a_bias_is_folded_nearly(tmp_path, capsys):
    """A bias left out, which says other tokens; a direction of other states than the map reads."""
    exits = write_exits(SHIPPED, tmp_path / "exits", exit_layers=[9], init="copy", architecture="linear", output="tied")
    torch.manual_seed(0)
    tensors = load_file(exits / "exit_heads.safetensors")
    tensors["exits.9.linear.bias"] += 0.3 * torch.randn_like(tensors["exits.9.linear.bias"])
    save_file(tensors, exits / "exit_heads.safetensors", metadata={"format": "pt"})
    write_manifest(exits)
    words = ("--model", SHIPPED, "--exits", exits, "--exit", 9, "--output", tmp_path / "draft", "--check")
    export(*words, "--fold-bias")
    told = capsys.readouterr().out
    assert float(told.partition("layer 9: ")[2].partition("%")[0]) > 90, told
    assert "nearly" in (tmp_path / "draft" / "README.md").read_text()
