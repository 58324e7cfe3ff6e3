"""An exported folder, loaded by transformers in a process that can not import ee_tuning, decodes as our engine does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from decoding import decode
from exits import loaded_with, write_exits
from random_models import random_llama, random_model
from safetensors.torch import load_file

from ee_tuning import cli

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64], [99, 1, 0]]
THRESHOLDS = (1.1, 0.8, 0.4)
NEW_TOKENS = 24

STRANGER = """
import json, sys
sys.modules["ee_tuning"] = None  # importing it fails
import torch, transformers
transformers.utils.logging.disable_progress_bar()
folders, prompts, thresholds, count = json.loads(sys.argv[1])
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
keys = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)

def opened(folder, **more):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **more)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the other one has no float64
    return model

def told(made, width):
    return [made.sequences[:, width:].tolist(), made.exit_layers.tolist()]

def decoded(early, threshold, **more):
    whole = early.generate(ids, attention_mask=mask, exit_threshold=threshold, return_dict_in_generate=True, **keys, **more)
    return told(whole, width)

def alone(early, threshold):
    rows = [early.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)).long(), exit_threshold=threshold,
                           return_dict_in_generate=True, **keys) for p in prompts]
    rows = [told(row, len(p)) for row, p in zip(rows, prompts)]
    return [[row[0][0] for row in rows], [row[1][0] for row in rows]]

def drawn(model, **more):
    torch.manual_seed(5)
    options = {**keys, "do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95}
    return model.generate(ids, attention_mask=mask, **options, **more).tolist()

def until(token, model, **more):
    return model.generate(ids, attention_mask=mask, **{**keys, "eos_token_id": token, "pad_token_id": 100}, **more).tolist()

def report(folder):
    plain, early = opened(folder), opened(folder, trust_remote_code=True)
    whole = plain.generate(ids, attention_mask=mask, **keys)
    return plain, early, whole, {
        "class": type(plain).__module__, "early_class": type(early).__name__,
        "state": sorted(early.state_dict()) == sorted(plain.state_dict()),
        "batch": [decoded(early, t) for t in thresholds], "impatient": decoded(early, thresholds[-1], max_pending=1),
        "plain": whole[:, width:].tolist()}

def more(plain, early, whole):
    end = whole[0, width + 3].item()
    early.save_pretrained(sys.argv[2])
    again = opened(sys.argv[2], trust_remote_code=True)
    return {
        "alone": [alone(early, t) for t in thresholds],
        "untold": early.generate(ids, attention_mask=mask, **keys)[:, width:].tolist(),
        "drawn": [drawn(plain), drawn(early), drawn(early, exit_threshold=1.1)], "drawn_early": drawn(early, exit_threshold=0.4),
        "until": [until(end, plain), until(end, early, exit_threshold=1.1)], "again": decoded(again, 0.4)}

reports = {}
for folder in folders:
    *models, reports[folder] = report(folder)
    if folder == folders[0]:
        reports[folder] |= more(*models)
print(json.dumps(reports))
"""


def stranger(folders: list[Path], scratch: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": "",
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    job = json.dumps([list(map(str, folders)), PROMPTS, THRESHOLDS, NEW_TOKENS])
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, job, str(scratch / "again")],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ours(model: Path, exits: Path, threshold: float) -> list[list[list[int]]]:
    """[tokens of each prompt, exit layers of each]."""
    loaded = loaded_with(model, exits, dtype="float64")
    answers = decode(loaded, PROMPTS, NEW_TOKENS, threshold=threshold)
    return [[said.tokens for said in answers], [said.exit_layers for said in answers]]


def export(*words: str | Path, code: int = 0) -> None:
    assert cli.main(["export", "--format", "hf", *map(str, words)]) == code


# The first is looked at most closely. What is drawn at random has biases of 0 and adapters like any other; a copied
# adapter is none. "listed" heads say every third token, and any other as one class more.
KINDS = [
    ("llama", "mlp", "untied", "random"),
    ("llama", "norm", "listed", "random"),
    ("gpt2", "mlp", "listed", "copy"),
    ("llama", "mlp", "tied", "random"),
    ("llama", "norm", "untied", "random"),
    ("llama", "adapter", "tied", "random"),
    ("mistral", "layer,linear", "untied", "random"),
    ("qwen2", "embedding", "untied", "random"),
    ("qwen2", "mlp", "untied", "copy"),
    ("qwen3", "layer", "untied", "copy"),
    ("gpt2", "mlp", "untied", "copy"),
    ("gpt2", "layer", "untied", "random"),
    ("mixtral", "norm", "untied", "random"),
    ("qwen3_moe", "norm,adapter", "untied", "random"),
    ("mixtral", "layer,norm", "untied", "random"),
    ("qwen3_moe", "layer", "tied", "copy"),
]


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with model, exits and export of each kind; what a process without ee_tuning makes of the exports."""
    folder = tmp_path_factory.mktemp("kinds")
    for i, (family, architecture, output, init) in enumerate(KINDS):
        own = folder / str(i)
        random_model(family, own / "model", confident=True)
        kind = {"listed": range(0, 101, 3), "output": "untied"} if output == "listed" else {"output": output}
        write_exits(own / "model", own / "exits", architecture=architecture.split(","), init=init, **kind)
        export("--model", own / "model", "--exits", own / "exits", "--output", own / "export")
    return folder, stranger([folder / str(i) / "export" for i in range(len(KINDS))], folder)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["-".join(kind) for kind in KINDS])
def test_a_stranger_decodes_as_our_engine_does(decoded, kind):
    """A head fed the wrong states, a cache that lacks a skipped token, a padded row that sees its padding, one decision
    for a batch.
    """
    own, told = decoded[0] / str(kind), decoded[1][str(decoded[0] / str(kind) / "export")]
    family = KINDS[kind][0]
    assert told["class"] == f"transformers.models.{family}.modeling_{family}" and told["early_class"].startswith(
        "EarlyExit"
    )
    assert told["state"], "exit tensors in the state dict would end in the plain model's checkpoint"
    wanted = [ours(own / "model", own / "exits", threshold) for threshold in THRESHOLDS]
    assert len({layer for _, rows in wanted for left in rows for layer in left}) > 1, "else the claim is empty"
    assert told["batch"] == wanted
    assert told["impatient"] == wanted[-1]
    assert told["plain"] == wanted[0][0]


def test_rows_sampling_ends_and_saving(decoded):
    """What a batch of one, a sampler, a stop token or a saved copy of the exported model does otherwise."""
    told = decoded[1][str(decoded[0] / "0" / "export")]
    assert told["alone"] == told["batch"]
    assert {layer for rows in (rows for _, rows in told["batch"]) for left in rows for layer in left} == {2, 4, 6}
    assert told["again"] == told["batch"][-1] and told["untold"] == told["plain"]
    assert told["drawn"][0] == told["drawn"][1] == told["drawn"][2] != told["drawn_early"]
    assert told["until"][0] == told["until"][1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several shards, and exits."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder / "model").save_pretrained(folder / "model", max_shard_size="100KB")
    (folder / "model" / "model.safetensors").unlink(missing_ok=True)
    (folder / "model" / "LICENSE").write_text("as you like")
    (folder / "model" / "pytorch_model.bin").write_bytes(b"another format")
    write_exits(folder / "model", folder / "exits")
    return folder


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_the_backbone_s_files_are_its_own(llama, tmp_path, link):
    """A shard written anew has other bytes, and no longer the hash that its publisher gives."""
    export("--model", llama / "model", "--exits", llama / "exits", "--output", tmp_path / "export", *link)
    shards = [path.name for path in (llama / "model").glob("*.safetensors")]
    assert len(shards) > 1
    for name in (*shards, "model.safetensors.index.json", "LICENSE"):
        assert (tmp_path / "export" / name).read_bytes() == (llama / "model" / name).read_bytes()
        assert (tmp_path / "export" / name).samefile(llama / "model" / name) == (bool(link) and name in shards)
    assert not (tmp_path / "export" / "pytorch_model.bin").exists()
    assert cli.main(["verify", str(tmp_path / "export")]) == 0
    assert cli.main(["inspect", str(tmp_path / "export")]) == 0


def test_another_disk_gets_a_relative_link(llama, tmp_path, monkeypatch):
    """Hard links end at the disk's edge; an absolute one breaks when both folders move."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    export("--model", llama / "model", "--output", tmp_path / "export", "--link")
    link = next((tmp_path / "export").glob("model-00001*"))
    assert link.is_symlink() and not os.path.isabs(os.readlink(link)) and link.samefile(llama / "model" / link.name)


def test_without_exits_the_plain_model_comes_back(llama, tmp_path):
    """Exits of an earlier export that stay in the config would make the plain model ask for code."""
    export("--model", llama / "model", "--exits", llama / "exits", "--output", tmp_path / "early")
    export("--model", tmp_path / "early", "--output", tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (llama / "model" / "config.json").read_text()
    )
    for path in (llama / "model").glob("model*"):
        assert (tmp_path / "plain" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "plain").glob("*exit*"))
    export("--model", llama / "model", "--output", tmp_path / "direct")
    assert (tmp_path / "direct" / "config.json").read_bytes() == (llama / "model" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (None, {}),
        ({"AutoTokenizer": ["tok.T", None]}, {"AutoTokenizer": ["tok.T", None]}),
        ({}, {}),
        ({"AutoModelForCausalLM": "modeling_early_exit.Old", "AutoConfig": "other.C"}, {"AutoConfig": "other.C"}),
    ],
)
def test_classes_of_others_stay(llama, tmp_path, told, kept):
    """A traceback, after all weights were written, on what transformers itself writes for a tokenizer of its own."""
    model = Path(shutil.copytree(llama / "model", tmp_path / "model"))
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "auto_map": told}))
    export("--model", model, "--exits", llama / "exits", "--output", tmp_path / "early")
    made = json.loads((tmp_path / "early" / "config.json").read_text())
    tokenizers = {key: value for key, value in kept.items() if key == "AutoTokenizer"}
    assert made["auto_map"] == {**tokenizers, "AutoModelForCausalLM": "modeling_early_exit.EarlyExitLlamaForCausalLM"}
    export("--model", model, "--output", tmp_path / "plain")
    is_whole = (tmp_path / "plain" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert is_whole == (kept == (told or {}))
    assert (json.loads((tmp_path / "plain" / "config.json").read_text())["auto_map"] or {}) == kept


def test_code_and_named_templates_come_along(llama, tmp_path):
    """An export whose config names code that was left behind loads nowhere; templates beside the default one are
    lost.
    """
    import transformers

    model = Path(shutil.copytree(llama / "model", tmp_path / "model"))
    (model / "configuration_own.py").write_text(
        "import transformers\nclass OwnConfig(transformers.LlamaConfig): pass\n"
    )
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}))
    write_byte_tokenizer(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    export("--model", model, "--exits", llama / "exits", "--output", tmp_path / "early")
    export("--model", model, "--output", tmp_path / "plain")
    export("--model", model, "--tokenizer", model, "--output", tmp_path / "plain", "--overwrite")
    early = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "early", trust_remote_code=True)
    assert type(early).__name__ == "EarlyExitLlamaForCausalLM" and type(early.config) is transformers.LlamaConfig, (
        "other code ran"
    )
    assert (tmp_path / "plain" / "configuration_own.py").read_text() == (model / "configuration_own.py").read_text()
    for folder in ("early", "plain"):
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == tokenizer.chat_template
        assert cli.main(["verify", str(tmp_path / folder)]) == 0
        (tmp_path / folder / "additional_chat_templates" / "tool_use.jinja").write_text("other")
        assert cli.main(["verify", str(tmp_path / folder)]) == 2


def test_classes_that_are_none_are_refused_before_anything_is_written(llama, tmp_path, capsys):
    """A traceback for a config that no transformers wrote."""
    model = Path(shutil.copytree(llama / "model", tmp_path / "model"))
    (model / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), "auto_map": [1]}))
    export("--model", model, "--output", tmp_path / "export", code=2)
    assert "auto_map" in capsys.readouterr().err and not (tmp_path / "export").exists()


def test_a_tokenizer_fills_in_what_the_model_does_not_say(llama, tmp_path):
    """A chat model that ends its turns by one of several tokens, rewritten to know one of them."""
    model = Path(shutil.copytree(llama / "model", tmp_path / "model"))
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**tree, "eos_token_id": [7, 9], "bos_token_id": None}))
    export("--model", model, "--tokenizer", SHIPPED, "--output", tmp_path / "export")
    made = json.loads((tmp_path / "export" / "config.json").read_text())
    assert made["eos_token_id"] == [7, 9]
    assert made["bos_token_id"] == json.loads((SHIPPED / "config.json").read_text())["bos_token_id"]


def test_what_does_not_belong_together_is_refused(llama, tmp_path, capsys):
    """Exits of another model in one folder with this one decode noise for everybody who loads it."""
    random_llama(tmp_path / "other", seed=3)
    output = tmp_path / "export"
    for words, named in (
        (["--model", tmp_path / "other", "--exits", llama / "exits"], "fingerprint"),
        (["--model", llama / "model", "--check"], "--exits"),
        (["--model", llama / "model", "--drop", "2"], "--drop"),
        (["--exits", llama / "exits"], "--model"),
    ):
        export(*words, "--output", output, code=2)
        assert named in capsys.readouterr().err and not output.exists()
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        export("--model", llama / "model", "--output", output, *more, code=2)
        assert (output / "diary.txt").read_text() == "mine" and len(list(output.iterdir())) == 1


def test_a_megatron_checkpoint_comes_out_with_a_tokenizer(tmp_path, capsys):
    """A folder that loads and can neither read nor end a text; links to weights that are not there."""
    words = ["export", "--model", str(SHIPPED)]
    assert cli.main([*words, "--format", "megatron", "--output", str(tmp_path / "megatron")]) == 0
    (tmp_path / "megatron" / "config.json").unlink()
    (tmp_path / "megatron" / "manifest.json").unlink()
    exits = write_exits(tmp_path / "megatron", tmp_path / "exits", init="copy")
    words = ["--model", tmp_path / "megatron", "--exits", exits, "--output", tmp_path / "export"]
    export(*words, "--link", code=2)
    assert "--link" in capsys.readouterr().err and not (tmp_path / "export").exists()
    export(*words, "--tokenizer", SHIPPED, "--check")
    made, own = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "export", SHIPPED))
    assert made["eos_token_id"] == own["eos_token_id"] and made["architectures"] == own["architectures"]
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (SHIPPED / "tokenizer.json").read_bytes()
    assert cli.main(["verify", str(tmp_path / "export")]) == 0


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gpt2", "mixtral"])
def test_every_family_can_be_checked(tmp_path, capsys, monkeypatch, family):
    """A check that knows Llama's class alone, or takes grouped products for experts, which want widths of multiples of
    16 bytes.
    """
    import transformers

    # What transformers notes of a class, its subclasses inherit: so it is where a process has loaded a plain Mixtral
    # before.
    monkeypatch.setattr(
        transformers.MixtralForCausalLM, "_can_set_experts_implementation_cached_value", True, raising=False
    )
    random_model(family, tmp_path / "model", vocab_size=300)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="norm")
    export(
        "--model",
        tmp_path / "model",
        "--exits",
        exits,
        "--output",
        tmp_path / "export",
        "--tokenizer",
        SHIPPED,
        "--check",
    )
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_an_export_is_replaced_only_on_demand(llama, tmp_path, capsys):
    """A second export that quietly replaces the first."""
    export("--model", llama / "model", "--output", tmp_path / "export")
    export("--model", llama / "model", "--output", tmp_path / "export", code=2)
    assert "--overwrite" in capsys.readouterr().err
    export("--model", llama / "model", "--exits", llama / "exits", "--output", tmp_path / "export", "--overwrite")
    assert (tmp_path / "export" / "modeling_early_exit.py").exists()


def test_check_compares_every_exit_and_finds_a_difference(tmp_path, capsys, monkeypatch):
    """A check that can not fail; one that is content with the final head; one that wants as many processes as the
    job; one that leaves a file of its own, so that the folder can not be replaced any more.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    exits = write_exits(SHIPPED, tmp_path / "exits", exit_layers=[3, 9], init="copy")
    words = [
        "--model",
        SHIPPED,
        "--exits",
        exits,
        "--output",
        tmp_path / "export",
        "--check",
        "--set",
        "parallel.tensor_model_parallel_size=4",
        "--set",
        "parallel.pipeline_layout=[6,6]",
    ]
    export(*words)
    wrote, *lines = capsys.readouterr().out.splitlines()
    assert wrote.startswith("wrote ")
    assert [line.partition(":")[0] for line in lines] == [
        "exit after layer 3",
        "exit after layer 9",
        "the model's own head",
    ]
    from ee_tuning.export import export_huggingface

    wrong = tmp_path / "modeling_early_exit.py"
    wrong.write_text(
        export_huggingface.MODELLING.read_text().replace("x = seen.residual + self", "x = seen.hidden + self")
    )
    monkeypatch.setattr(export_huggingface, "MODELLING", wrong)
    export(*words, "--overwrite", code=1)  # refused if the first check had left anything
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ["above" in line for line in lines] == [True, True, False]


def test_exit_tensors_are_the_artifact_s(llama, tmp_path):
    """Heads copied under other names would be read as none."""
    export("--model", llama / "model", "--exits", llama / "exits", "--output", tmp_path / "export")
    got, wanted = (load_file(folder / "exit_heads.safetensors") for folder in (tmp_path / "export", llama / "exits"))
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("place", ["model-00002", "exit_heads", "config.json"])
def test_a_killed_export_leaves_nothing_that_loads(llama, tmp_path, place):
    """Half a folder under the name that was asked for, taken for a whole one."""
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom ee_tuning import cli\n"
        "from ee_tuning.export import folder_writer as writer\n"
        "def dying(does):\n    def dies(first, *more, **keys):\n"
        "        if Path(getattr(first, 'name', first)).name.startswith(sys.argv[1]):\n            os._exit(9)\n"
        "        return does(first, *more, **keys)\n    return dies\n"
        "writer._written, writer.shutil.copyfile = dying(writer._written), dying(writer.shutil.copyfile)\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    words = ["export", "--format", "hf", "--model", llama / "model", "--output", tmp_path / "export"]
    words += [] if place == "config.json" else ["--exits", llama / "exits"]
    done = subprocess.run(
        [sys.executable, "-c", script, place, *map(str, words)],
        cwd=SHIPPED.parents[1],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 9
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob("*/config.json")), "what was left behind could be loaded"
    export(*words[3:])
    assert cli.main(["verify", str(tmp_path / "export")]) == 0 and [path.name for path in tmp_path.iterdir()] == [
        "export"
    ]
