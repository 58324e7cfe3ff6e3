"""Drafting heads on their way to engines and back: the layout that vLLM reads, speculators', and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exits import write_exits
from gguf_files import Kind, write_gguf
from random_models import random_model
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from ee_tuning.artifact.eagle3_card import eagle3_card
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.artifact.tried_engines import TRIED
from ee_tuning.checkpoint import formats
from ee_tuning.cli import main
from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.export.eagle3_layout import Layout, published_config, read_published_config
from ee_tuning.model.draft_spec import draft_spec
from ee_tuning.model_config.config import read_model_config
from ee_tuning.storage import tensor_blocks
from ee_tuning.tuning.command import _next_command

LISTED = (0, 3, 5, 20, 49, 60, 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    random_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def places(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A drafting head, and exits."""
    folder = tmp_path_factory.mktemp("places")
    return {"HEAD": write_head(model, folder / "head"), "EXITS": write_exits(model, folder / "exits")}


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of a reduced vocabulary, in vLLM's layout."""
    folder = tmp_path_factory.mktemp("exported")
    export(model, write_head(model, folder / "head", LISTED), folder / "out", "eagle3")
    return folder / "out"


def write_head(model: Path, folder: Path, listed: tuple[int, ...] = (), **keys: Any) -> Path:
    return write_exits(
        model, folder, listed, **{"exit_layers": [], "architecture": "eagle3", "aux_layers": [1, 3, 5], **keys}
    )


def export(model: Path, head: Path, output: Path, layout: str) -> dict[str, Any]:
    arguments = ["export", "--format", layout, "--model", str(model), "--exits", str(head), "--output", str(output)]
    assert main(arguments) == 0
    return json.loads((output / "config.json").read_text(encoding="utf-8"))


def vllm_parameters(folder: Path, config: dict[str, Any]) -> dict[str, torch.Size]:
    """The parameters that vLLM 0.33 gives a head of this config.json, by the names that it asks a file for."""
    hidden, heads, groups, width = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    inner, layer = config["intermediate_size"], "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, config["target_hidden_size"] * len(config["eagle_aux_hidden_state_layer_ids"])),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
        **{
            f"{layer}{name}.weight": (hidden,)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        f"{layer}self_attn.q_proj.weight": (heads * width, 2 * hidden),
        f"{layer}self_attn.k_proj.weight": (groups * width, 2 * hidden),
        f"{layer}self_attn.v_proj.weight": (groups * width, 2 * hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, heads * width),
        f"{layer}mlp.gate_proj.weight": (inner, hidden),
        f"{layer}mlp.up_proj.weight": (inner, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, inner),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("listed", [(), LISTED], ids=["whole", "listed"])
def test_vllm_finds_every_parameter_under_its_name(model: Path, tmp_path: Path, listed: tuple[int, ...]) -> None:
    """A tensor that vLLM would not find, or find in another shape; an offset that leads to another token."""
    config = export(model, write_head(model, tmp_path / "head", listed), tmp_path / "out", "eagle3")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 1
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5] and config["vocab_size"] == 101
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 4]  # as SGLang counts
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    d2t, t2d = renamed.pop("d2t", None), renamed.pop("t2d", None)
    assert {name: tensor.shape for name, tensor in renamed.items()} == vllm_parameters(tmp_path / "out", config)
    if listed:
        assert d2t is not None and t2d is not None
        assert (d2t + torch.arange(len(d2t))).tolist() == list(listed) == t2d.nonzero().flatten().tolist()


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_a_head_comes_back_as_it_was_exported(tmp_path: Path, family: str, layout: str) -> None:
    """A name, a variant, a layer count or a row of the output matrix that one direction gets wrong."""
    random_model(family, tmp_path / "model")
    head = write_head(tmp_path / "model", tmp_path / "head", LISTED, init="random")
    export(tmp_path / "model", head, tmp_path / "out", layout)
    arguments = ["convert", "--model", str(tmp_path / "model"), "--eagle3", str(tmp_path / "out")]
    assert main([*arguments, "--output", str(tmp_path / "back")]) == 0
    with ExitHeadsReader(head) as one, ExitHeadsReader(tmp_path / "back") as other:
        assert one.names() == other.names() and one.config.draft == other.config.draft
        assert all(torch.equal(one.full(name), other.full(name)) for name in one.names())
        assert other.config.token_ids == LISTED and other.config.init == "published"


def facts(family: str = "llama", **draft: Any) -> dict[str, Any]:
    """What a card reads of exit_config.json."""
    shared = {"dtype": "float32", "init": "copy", "seed": 1, "tuned": None}
    shape = {"family": family, "num_layers": 6}
    return {**shared, "model_shape": shape, "draft": {"aux_layers": [1, 3, 5], **draft}}


@pytest.mark.parametrize("variant", ["", "fc_norm", "norm_output"])
def test_the_card_has_llama_cpp_only_for_heads_that_it_computes(variant: str) -> None:
    """A command whose converter leaves a norm out: the drafts of another head, and none of them accepted."""
    exits = facts(**({variant: True} if variant else {}))
    for layout in ("eagle3", "speculators"):
        card = eagle3_card("org/model", exits, layout, 3)
        assert ("--target-model-dir org/model" in card) == ("--spec-type draft-eagle3" in card) == (not variant)
        assert ("does not compute" in card) == bool(variant)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_the_card_tells_what_was_tried(family: str) -> None:
    """Commands that nobody has run, for SGLang or with a family other than Llama, without a word of it."""
    for layout in ("eagle3", "speculators"):
        card = eagle3_card("org/model", facts(family), layout, 3)
        for engine in ("vLLM", "llama.cpp"):
            assert (f"Tried with {engine} {TRIED[engine].version}." in card) == (family == "llama")
        assert card.count(f"Not tried with a `{family}`") == (0 if family == "llama" else 2)
        assert ("Not tried; the flags were read in the source of SGLang" in card) == ("sglang" in card)
        assert ("vllm serve THIS_FOLDER" in card) == (layout == "speculators")


@pytest.mark.parametrize(
    ("family", "draft", "reason"),
    [
        ("llama", {}, ""),
        ("qwen3_moe", {}, "no drafting layer for a `qwen3_moe`"),
        ("llama", {"norm_before_residual": True}, "passes over `norm_before_residual`"),
        ("llama", {"aux_layers": [1, 3, 6]}, "no states behind the last layer"),
    ],
)
def test_the_card_has_sglang_only_for_heads_that_it_runs(family: str, draft: dict[str, Any], reason: str) -> None:
    """A server that does not start, or that drafts with another head's layer and has nothing accepted."""
    card = eagle3_card("org/model", facts(family, **draft), "eagle3", 3)
    assert ("sglang.launch_server" in card) == (not reason) and reason in card


def test_a_head_that_no_engine_takes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose commands fail in vLLM and in SGLang after the model has been loaded there."""
    random_model("mixtral", tmp_path / "model")
    head = write_head(tmp_path / "model", tmp_path / "head", LISTED)
    capsys.readouterr()
    for layout in ("eagle3", "speculators"):
        words = ["export", "--format", layout, "--model", str(tmp_path / "model"), "--exits", str(head)]
        assert main([*words, "--output", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told and "a mixtral takes none" in told and "--policy speculative" in told
    assert not (tmp_path / "out").exists() and "--policy speculative" in (head / "README.md").read_text()


def test_vllm_is_told_how_many_states_a_head_reads(model: Path, tmp_path: Path) -> None:
    """A head of two layers' states that vLLM gives room for three: it reads the number of the layer's config."""
    words = ["convert", "--model", str(model), "--architecture", "eagle3", "--aux-layers", "2,5"]
    assert main([*words, "--output", str(tmp_path / "head")]) == 0
    config = export(model, tmp_path / "head", tmp_path / "out", "speculators")
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 2
    assert (
        main(["convert", "--model", str(model), "--eagle3", str(tmp_path / "out"), "--output", str(tmp_path / "back")])
        == 0
    )


def test_a_tied_output_matrix_is_left_to_the_engine(model: Path, tmp_path: Path) -> None:
    """A copy of the model's own output matrix that takes memory again, or a size that makes SGLang look for one."""
    config = export(model, write_head(model, tmp_path / "head", output="tied"), tmp_path / "out", "eagle3")
    assert config["draft_vocab_size"] is None
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_speculators_own_class_loads_the_folder(model: Path, tmp_path: Path) -> None:
    """A config.json that its validation refuses, or weights that it does not find."""
    eagle3 = pytest.importorskip("speculators.models.eagle3")
    config = export(model, write_head(model, tmp_path / "head", LISTED), tmp_path / "out", "speculators")
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(model)
    loaded = eagle3.Eagle3DraftModel.from_pretrained(str(tmp_path / "out"))
    with ExitHeadsReader(tmp_path / "head") as head:
        assert torch.equal(loaded.fc.weight, head.full("exits.6.fc.weight"))
        assert torch.equal(loaded.lm_head.weight, head.full("exits.6.output.weight"))
        assert torch.equal(loaded.layers[0].mlp.up_proj.weight, head.full("exits.6.midlayer.mlp.up_proj.weight"))


@pytest.fixture(scope="module")
def stored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """The model in forms that engines do not load, as flags."""
    folder = tmp_path_factory.mktemp("stored")
    whole = random_model("llama", folder / "whole", vocab_size=257, eos_token_id=256, bos_token_id=256)
    write_gguf(folder / "model.gguf", whole, alphabet=[*sorted(ByteLevel.alphabet())[:255], "ab", "<end>"])
    assert main(["export", "--format", "megatron", "--model", str(model), "--output", str(folder / "megatron")]) == 0
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): torch.ones(2, 48), name.format("B"): torch.ones(40, 2)}
    save_file(weights, folder / "lora" / "adapter_model.safetensors")
    return {
        "gguf": ("--model", str(folder / "model.gguf")),
        "megatron": ("--model", str(folder / "megatron")),
        "adapter": ("--model", str(model), "--adapter", str(folder / "lora")),
    }


@pytest.mark.parametrize("form", ["gguf", "megatron", "adapter"])
def test_engines_are_told_a_model_that_they_can_load(
    stored: dict[str, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """A `verifier` that `vllm serve FOLDER` can not load, or the model without its trained weights; a card that names
    such a model in its commands; a remedy that does not help.
    """
    flags, head = stored[form], str(tmp_path / "head")
    assert main(["convert", *flags, "--architecture", "eagle3", "--aux-layers", "1,3,5", "--output", head]) == 0
    words = ["export", *flags, "--exits", head, "--output", str(tmp_path / "out"), "--format"]
    capsys.readouterr()
    assert main([*words, "speculators"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and f"ee-tuning export --format hf {' '.join(flags)} --output FOLDER" in told
    assert not (tmp_path / "out").exists()
    assert main([*words, "eagle3"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve MODEL_FOLDER --spec" in card and "--target-model-dir MODEL_FOLDER" in card
    merging = " ".join(Path(word).name for word in flags)
    assert f"`ee-tuning export --format hf {merging} --output MODEL_FOLDER`; " in card
    merged = str(tmp_path / "merged")
    assert main(["export", "--format", "hf", *flags, "--output", merged]) == 0
    last = ["export", "--format", "speculators", "--model", merged, "--exits", head]
    assert main([*last, "--output", str(tmp_path / "last")]) == 0
    described = json.loads((tmp_path / "last" / "config.json").read_text())
    assert described["speculators_config"]["verifier"]["name_or_path"] == merged
    assert "vllm serve merged --spec" in (tmp_path / "last" / "README.md").read_text()


def test_the_next_command_of_a_run_is_one_that_works(stored: dict[str, tuple[str, ...]], model: Path) -> None:
    """A run that ends with an export that is refused, or that lacks the adapter it tuned on."""
    forms = {"folder": ("--model", str(model)), "hub": ("--model", "org/name@main"), **stored}
    for form, flags in forms.items():
        keys = dict(zip(("model.path", "model.adapter"), flags[1::2], strict=False))
        exits = SimpleNamespace(exit_layers=(6,), draft=object(), model_shape={"family": "llama"})
        tuner: Any = SimpleNamespace(backbone=None, run_folder=Path("runs/draft"), exits_config=exits)
        layout = "speculators" if form in ("folder", "hub") else "eagle3"
        wanted = f"ee-tuning export --format {layout} {' '.join(flags)} --exits runs/draft/exit_heads --output FOLDER"
        assert _next_command(load_config(None, keys), tuner) == wanted


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_name_on_the_hub_stays_one_without_a_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    """`org/name@main`, which engines do not load; a path of this machine for a model that everybody can fetch."""
    monkeypatch.setattr(formats, "fetch_model", lambda name, **_: model)
    head = write_head(model, tmp_path / "head")
    config = export(Path(f"org/name{revision}"), head, tmp_path / "out", "speculators")
    named = config["speculators_config"]["verifier"]["name_or_path"]
    assert named == (str(model) if revision else "org/name")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if key != name} | ({} if tensor is None else {name: tensor})
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("break_head", "words"),
    [
        (lambda folder: change_config(folder, vocab_size=99), ["vocab_size", "101", "99"]),
        (lambda folder: change_config(folder, draft_vocab_size=50), ["draft_vocab_size must be 7", "50"]),
        (lambda folder: change_config(folder, draft_vocab_size="7"), ["draft_vocab_size must be 7", "'7'"]),
        (lambda folder: change_tensor(folder, "d2t", None), ["draft_vocab_size must be 101", "7"]),
        (lambda folder: change_tensor(folder, "d2t", torch.zeros(0, dtype=torch.int64)), ["d2t", "at least one"]),
        (lambda folder: change_tensor(folder, "norm.weight", torch.full((48,), torch.nan)), ["norm.weight", "NaN"]),
        (lambda folder: change_config(folder, hidden_size=64), ["hidden_size", "48", "64"]),
        (lambda folder: change_config(folder, target_hidden_size=64), ["target_hidden_size", "48", "64"]),
        (lambda folder: change_config(folder, architectures=["LlamaForCausalLM"]), ["EAGLE-3"]),
        (lambda folder: change_config(folder, eagle_aux_hidden_state_layer_ids=[2, 4, 9]), ["2, 4, 9", "6"]),
        (lambda folder: change_config(folder, attention_bias=True), ["biases"]),
        (lambda folder: change_config(folder, num_hidden_layers=2), ["one layer", "2"]),
        (
            lambda folder: change_tensor(folder, "d2t", torch.tensor([0, 2, 3, 17, 45, 55, 95])),
            ["d2t", "token 101", "101"],
        ),
        (lambda folder: change_tensor(folder, "d2t", torch.tensor([-1, 2, 3, 17, 45, 55, 94])), ["d2t", "token -1"]),
        (lambda folder: change_tensor(folder, "d2t", torch.tensor([0, 2, 3, 2, 45, 55, 94])), ["d2t", "token 5 twice"]),
        (lambda folder: change_tensor(folder, "fc.weight", None), ["fc.weight"]),
        (lambda folder: change_tensor(folder, "fc.weight", torch.zeros(48, 96)), ["fc.weight", "144", "96"]),
        (lambda folder: change_tensor(folder, "surprise", torch.zeros(2)), ["surprise"]),
        (lambda folder: change_tensor(folder, "embed_tokens.weight", torch.ones(101, 48)), ["embed_tokens", "own"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "--eagle3"]),
    ],
)
def test_a_head_that_does_not_fit_is_refused_in_one_line(
    model: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], break_head: Any, words: list[str]
) -> None:
    """A head of another model that is tuned for hours, or a traceback."""
    shutil.copytree(exported, tmp_path / "out")
    break_head(tmp_path / "out")
    capsys.readouterr()
    arguments = [
        "convert",
        "--model",
        str(model),
        "--eagle3",
        str(tmp_path / "out"),
        "--output",
        str(tmp_path / "back"),
    ]
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and all(word in told for word in words), told
    assert not (tmp_path / "back").exists()


NO_OBJECT = ("yes", "", 5, 0, True, False, [], [1], 1e308)
NO_TRUTH = ("no", "", 1, 0, -1, [], [True], {}, {"a": 1})
NO_LAYERS = (5, 0, -1, 10**30, 2.5, True, False, "5", "", {}, {"2": 3}, ["a"], [None], [True, 3], [1.0, 3.0], [[1]])


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize(
    ("key", "within", "values"),
    [
        ("eagle_config", "", NO_OBJECT),
        ("use_aux_hidden_state", "eagle_config", NO_TRUTH),
        ("norm_before_residual", "", NO_TRUTH),
        ("norm_before_residual", "eagle_config", NO_TRUTH),
        ("fc_norm", "", NO_TRUTH),
        ("eagle_aux_hidden_state_layer_ids", "", NO_LAYERS),
        ("eagle_aux_hidden_state_layer_ids", "eagle_config", NO_LAYERS),
        ("target_hidden_size", "", ("48", "", 0, -48, True, False, 10**30, [48], {})),
        ("transformer_layer_config", "", (None, "llama", 5, True, [1], [])),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_its_key(
    model: Path, layout: Layout, key: str, within: str, values: tuple[Any, ...]
) -> None:
    """A traceback for a published head's config.json; a word that is taken for true, or nothing for a default."""
    config, path = read_model_config(model), Path("head") / "config.json"
    draft = draft_spec(config, (1, 3, 5))
    right = published_config(draft, config, layout, draft_vocab_size=7, verifier="org/model", num_steps=3)
    assert read_published_config({**right, "eagle_config": None, "target_hidden_size": None}, path, config) == draft
    if key == "transformer_layer_config" and layout == "eagle3":
        return
    for value in values:
        tree = {**right, within: {key: value}} if within else {**right, key: value}
        if within and key.endswith("ids"):
            tree[key] = None
        with pytest.raises(InputError) as error:
            read_published_config(tree, path, config)
        told = str(error.value)
        assert told.startswith(f"{path}: {key} must be ") and f"{value!r:.60}; " in told and len(told) < 300, told


@pytest.mark.parametrize(
    ("stored", "kind"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "Q4_0")]
)
def test_the_models_own_embedding_is_recognized_in_any_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, kind: str
) -> None:
    """Blocks of bytes, which are other rows in another dtype: a right head refused from the second block on. Rounding
    to 4 bits taken for another embedding.
    """
    model = tmp_path / ("model" if kind in ("float32", "bfloat16") else "model.gguf")
    whole = random_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    if model.suffix:
        write_gguf(model, whole, kind=Kind[kind])
    else:
        whole.to(getattr(torch, kind)).save_pretrained(model)
    folder = tmp_path / "out"
    export(model, write_head(model, tmp_path / "head"), folder, "eagle3")
    monkeypatch.setattr(tensor_blocks, "BLOCK_BYTES", 10 * 64 * 4)
    own = whole.model.embed_tokens.weight.detach()
    arguments = ["convert", "--model", str(model), "--eagle3", str(folder), "--output"]
    for row, code in ((None, 0), (100, 2)):
        values = own.clone() if row is None else own.index_fill(0, torch.tensor(row), 0.3)
        change_tensor(folder, "embed_tokens.weight", values.to(stored))
        assert main([*arguments, str(tmp_path / f"back{row}")]) == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--format", "hf", "--exits", "HEAD"], ["drafting head", "--format eagle3"]),
        (["export", "--format", "artifact", "--exits", "EXITS", "--merge", "HEAD"], ["drafting head"]),
        (["export", "--format", "eagle3", "--exits", "EXITS"], ["--architecture eagle3"]),
        (["export", "--format", "speculators"], ["--exits"]),
        (["convert", "--architecture", "eagle3", "--exit-layers", "2"], ["--exit-layers", "alone"]),
        (["convert", "--architecture", "eagle3,mlp", "--exit-layers", "2,6"], ["alone"]),
        (["convert", "--architecture", "eagle3", "--aux-layers", "1,3,9"], ["0..6", "9"]),
        (["convert", "--architecture", "eagle3", "--aux-layers", "3,1"], ["1,3"]),
        (["convert", "--eagle3", "HEAD", "--exit-layers", "2"], ["--eagle3", "exits.exit_layers"]),
        (["convert", "--architecture", "eagle3", "--init", "fitted", "--data", "x"], ["fitted"]),
    ],
)
def test_what_a_drafting_head_is_not_for_is_refused_in_one_line(
    model: Path,
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    """A drafting head that is merged into exits, or exported as one, and is then no head at all."""
    given = [str(places.get(each, each)) for each in arguments]
    capsys.readouterr()
    assert main([*given, "--model", str(model), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and all(word in told for word in words), told
    assert not (tmp_path / "out").exists()
