"""GGUF files that are damaged, of an unknown kind, or without what reads them: one line, and nothing half done."""

import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from gguf_files import Kind, write_gguf
from random_models import random_model

from ee_tuning import cli
from ee_tuning.checkpoint.gguf_file import GgufReader, tokenizer_digest
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_digests
from ee_tuning.errors import InputError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 257,
    "eos_token_id": 256,
    "bos_token_id": 256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_model("llama", tmp_path_factory.mktemp("hf"), **SHAPE)


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tokenizer = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return [*(tokenizer.convert_ids_to_tokens(index) for index in range(255)), "ab", "<end>"]


@pytest.fixture
def path(tmp_path: Path, model: Any) -> Path:
    write_gguf(tmp_path / "model.gguf", model, kind=Kind.Q8_0)
    return tmp_path / "model.gguf"


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    """A broken download: a traceback from within numpy, a hang, or a model of zeros."""
    whole, rng = path.read_bytes(), random.Random(0)
    for size in [0, 3, 8, 23, 24, *(rng.randrange(24, len(whole)) for _ in range(60)), len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.gguf is no whole GGUF file: .*; fetch it again"):
            GgufReader(path)


def test_hostile_lengths_are_refused_at_once(path: Path) -> None:
    """A header that promises 2⁶⁰ fields, tensors or letters: minutes, or all memory, before the end of the file is
    noticed.
    """
    whole = path.read_bytes()
    for place in (8, 16, 24):
        path.write_bytes(whole[:place] + struct.pack("<Q", 1 << 60) + whole[place + 8 :])
        with pytest.raises(InputError, match="is no whole GGUF file"):
            GgufReader(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "mamba"},
            r"architecture 'mamba', and GGUF is read for llama, qwen2, qwen3; give the model as a Hugging Face folder",
        ),
        ({"leave_out": "context_length"}, r"must say llama\.context_length, a whole number, and says None"),
        ({"fields": {"llama.expert_count": 8}}, "a llama model with 8 experts"),
        ({"fields": {"llama.attention.sliding_window": 16}}, "sees the last 16 tokens of 128"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, "rope scaling 'longrope' is not read from GGUF"),
        ({"fields": {"llama.rope.scaling.type": "linear"}}, r"rope scaling linear needs factor"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path: Path, model: Any, changes: dict[str, Any], message: str) -> None:
    """Another architecture's tensors run as a Llama, or a field's default taken for what the model has."""
    write_gguf(tmp_path / "model.gguf", model, **changes)
    with pytest.raises(InputError, match=message):
        GgufReader(tmp_path / "model.gguf")


def test_another_block_format_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file whose formats are read by another one's rule, or refused without saying which it has."""
    path = tmp_path / "model.gguf"
    write_gguf(path, random_model("llama", tmp_path / "hf", **SHAPE), kind=Kind.Q5_0)
    assert cli.main(["convert", "--model", str(path), "--exit-layers", "1", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "stored as Q5_0, and GGUF is read in F32, F16, BF16, Q8_0, Q4_0" in told and not (tmp_path / "out").exists()


def test_the_package_is_named_where_it_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModuleNotFoundError, and nobody knows of the extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    path.touch()  # not the one that another test has read
    with pytest.raises(
        InputError, match=r"need the package gguf, which is not installed; pip install 'ee_tuning\[gguf\]'"
    ):
        GgufReader(path)


def test_a_folder_of_them_names_the_file_to_give(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ "Neither a Hugging Face folder nor a Megatron checkpoint", beside the file that would do."""
    assert cli.main(["inspect", str(path.parent)]) == 2
    assert f"holds GGUF files, which are given by name: --model {path}" in capsys.readouterr().err


def test_its_tokenizer_is_the_models(tmp_path: Path, model: Any, alphabet: list[str]) -> None:
    """A model that can be read and not spoken to; tokens that are kept for another tokenizer, or made anew for the
    same.
    """
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    write_gguf(path, model, alphabet=alphabet)
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token_id == 256 and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    write_gguf(other, model, alphabet=alphabet, kind=Kind.Q8_0)
    assert tokenizer_digest(path) == tokenizer_digest(other) == tokenizer_digests(path)["model.gguf"]
    write_gguf(other, model, alphabet=[*alphabet[:-3], alphabet[-2], alphabet[-3], alphabet[-1]])
    assert tokenizer_digest(path) != tokenizer_digest(other)


def test_commands_take_it_as_any_model(
    tmp_path: Path, model: Any, alphabet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that joins the file's name with that of a manifest, a config or a tokenizer."""
    path, text = tmp_path / "small.gguf", tmp_path / "text.txt"
    write_gguf(path, model, kind=Kind.Q8_0, alphabet=alphabet)
    text.write_text("all that there is to learn. " * 40)
    exits = str(tmp_path / "exits")
    assert (
        cli.main(["convert", "--model", str(path), "--exit-layers", "1", "--architecture", "norm", "--output", exits])
        == 0
    )
    assert cli.main(["inspect", str(path), "--json"]) == 0 and cli.main(["verify", str(path)]) == 0
    assert (
        cli.main(
            [
                "tune",
                "--model",
                str(path),
                "--exits",
                exits,
                "--data",
                str(text),
                "--train-iters",
                "1",
                "--seq-length",
                "32",
                "--micro-batch-size",
                "1",
                "--global-batch-size",
                "1",
                "--set",
                "tuning.eval_iters=0",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert (
        cli.main(
            (
                f"generate --model {path} --exits {tmp_path / 'run' / 'exit_heads'} --prompt all --max-new-tokens 3 "
                "--json"
            ).split()
        )
        == 0
    )
    told = capsys.readouterr().out
    assert '"format": "GGUF file"' in told and "exit heads `norm` after layer 1 of small," in told
