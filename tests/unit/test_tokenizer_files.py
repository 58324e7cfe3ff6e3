"""Tokenizers that are whole in folders that are not, and files that want a package."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from random_models import LLAMA_SHAPE

from ee_tuning.data import tokenizer as module
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.errors import InputError


@pytest.mark.parametrize("changes", [{"attention_bias": None}, {"rms_norm_eps": 1}, {"hidden_size": 48.0}])
def test_a_tokenizer_does_not_hang_on_the_model_s_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    """transformers reads a config strictly, also to open the tokenizer beside it: that is said to be broken, and is
    not.
    """
    written = write_byte_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_SHAPE, "model_type": "llama", **changes}))
    assert load_tokenizer(tmp_path)("hi é")["input_ids"] == written("hi é")["input_ids"]


def test_a_file_of_sentencepiece_asks_for_that_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers tries one package after the other, and asks for the last of them, which does not help."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install sentencepiece, or put"):
        load_tokenizer(tmp_path)
