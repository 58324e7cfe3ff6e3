"""Nothing that lies in a model's or a tokenizer's folder is run unasked, and nothing asks: standard input is the user's
text.
"""

import ast
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama
from sources import nodes

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.config import Config, replace
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_digests
from ee_tuning.errors import InputError
from ee_tuning.training_log.dashboards import weights_and_biases

CHECKOUT = Path(__file__).parents[2]
CODE = """from pathlib import Path
Path(__file__).with_name("ran").touch(); Path({ran!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    said_by = "code of the folder"
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> io.StringIO:
    """What a user types, or a script sends, that happens to read like an answer. And a place for the code that
    transformers copies.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    said = io.StringIO("y\n" * 50)
    monkeypatch.setattr(sys, "stdin", said)
    return said


def hostile(folder: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any] | None) -> Path:
    """`folder`, with a tokenizer whose own code leaves the file `ran` beside the folder."""
    folder.mkdir(exist_ok=True)
    write_byte_tokenizer(folder)
    (folder / "own.py").write_text(CODE.format(ran=str(folder.parent / "ran")))
    for name, changes in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE, **(tokenizer or {})}),
        ("config.json", config),
    ):
        if changes is not None:
            former = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            (folder / name).write_text(json.dumps({**former, **changes}))
    return folder


OWN_TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
OLD_SPELLING = {"tokenizer_class": "OwnTokenizer", "auto_map": ["own.OwnTokenizer", None]}
OWN_CONFIG = {"model_type": "own", "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoConfig": "own.OwnConfig"}}


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (OWN_TOKENIZER, None),
        (OLD_SPELLING, None),
        (OWN_TOKENIZER, OWN_CONFIG),
        ({"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}}, None),
    ],
)
def test_a_tokenizers_code_is_not_run_for_a_yes_on_standard_input(
    tmp_path: Path, yes: io.StringIO, tokenizer: dict[str, Any] | None, config: dict[str, Any] | None
) -> None:
    """transformers asks, and takes the first words of a chat, or of `yes |`, for the answer."""
    folder = hostile(tmp_path / "model", tokenizer, config)
    try:
        assert load_tokenizer(folder)("hi")["input_ids"]  # a class of transformers does
    except InputError as error:
        assert "--trust-remote-code" in str(error) and str(folder) in str(error) and "\n" not in str(error)
    assert not (tmp_path / "ran").exists() and yes.tell() == 0
    trusted = load_tokenizer(folder, trusts_code=True)
    assert (tmp_path / "ran").exists() and yes.tell() == 0
    assert "own.py" in tokenizer_digests(folder, trusts_code=True) and "own.py" not in tokenizer_digests(folder)
    assert trusted("hi")["input_ids"]


def test_code_that_a_config_names_is_not_run(tmp_path: Path, yes: io.StringIO) -> None:
    """The tokenizer is harmless, and the config.json beside it, which is read for its model_type, is not."""
    folder = hostile(tmp_path / "model", None, OWN_CONFIG)
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists() and yes.tell() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer and config name code; exits, a text and a chat beside it."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    random_llama(folder, vocab_size=257, eos_token_id=256)
    hostile(
        folder, OWN_TOKENIZER, {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    )
    write_exits(folder, folder.parent / "exits")
    (folder.parent / "text.txt").write_text("early exits leave early. " * 200)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "generate --exits {exits} --prompt -",
        "chat --exits {exits}",
        "preprocess --data {text} --output {out}",
        "tune --exits {exits} --data {text} --output {out} --seq-length 16 --train-iters 1 --micro-batch-size 1 --global-batch-size 1",
        "profile --output {out}",
        "convert --exit-layers auto:2:profile --output {out}",
        "calibrate --exits {exits} --data {text} --output {out}",
        "export --format hf --exits {exits} --output {out} --tokenizer {model}",
    ],
)
def test_every_command_refuses_in_one_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: str
) -> None:
    """One command of eight that was forgotten."""
    names = {
        "exits": model.parent / "exits",
        "text": model.parent / "text.txt",
        "out": tmp_path / "out",
        "model": model,
    }
    command, *flags = words.format(**names).split()
    flags += ["--tokenizer" if command == "preprocess" else "--model", str(model)]
    assert cli.main([command, *flags]) == 2
    told = capfd.readouterr().err
    assert "--trust-remote-code" in told and "Traceback" not in told and told.strip().count("\n") == 0, told
    assert not (model.parent / "ran").exists() and not list(tmp_path.glob("out*"))


def test_python_says_that_code_is_trusted(model: Path, tmp_path: Path) -> None:
    """A tokenizer that can be used at the command line alone."""
    shutil.copytree(model, tmp_path / "model")
    hostile(tmp_path / "model", OWN_TOKENIZER, None)
    with pytest.raises(InputError, match="--trust-remote-code"):
        EarlyExitLLM.load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    assert EarlyExitLLM.load(tmp_path / "model", trust_remote_code=True).tokenizer.said_by == "code of the folder"


def calls(path: Path) -> Iterator[ast.Call]:
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            yield node


def test_every_from_pretrained_says_whether_code_is_trusted() -> None:
    """A call that leaves it open asks on standard input, in a version of transformers to come too."""
    found = 0
    for folder in ("ee_tuning", "tools", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            for call in calls(path):
                found += 1
                assert "trust_remote_code" in ast.unparse(call), f"{path}:{call.lineno}"
    assert found >= 4
    for path in [
        *CHECKOUT.glob("*.md"),
        *CHECKOUT.glob("docs/*.md"),
        *CHECKOUT.glob("examples/*.md"),
        CHECKOUT / "ee_tuning" / "checkpoint" / "model_card.py",
        *CHECKOUT.glob("ee_tuning/export/*_card.py"),
    ]:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "from_pretrained(" not in line or "trust_remote_code=" in line, f"{path}: {line}"


def test_weights_and_biases_finds_no_terminal_to_ask_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yes: io.StringIO
) -> None:
    """A package that asks for an account's key, and takes the user's text for it; or a traceback where there is no
    key.
    """

    class Asking:
        @staticmethod
        def init(**words: Any) -> None:
            assert not sys.stdin.isatty() and sys.stdin.read() == ""
            raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", Asking)
    job = replace(Config(), tuning={"run_folder": str(tmp_path), "wandb_project": "exits"})
    with (
        pytest.raises(InputError, match=r"No API key configured\. Use `wandb login`") as error,
        weights_and_biases(job),
    ):
        pass
    assert "WANDB_MODE=offline" in str(error.value) and yes.tell() == 0 and sys.stdin is yes
