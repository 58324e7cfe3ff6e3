"""A random model of bytes with exits, and forms of answers with a check of each that does not use the grammar's
library.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM
from ee_tuning.config import load_config
from ee_tuning.parallel.topology import Topology

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -3, "maximum": 700},
        "kind": {"enum": ["a", "bc", None]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
CHOICE = ("yes", "yesterday", "no", "né")


def _is_json(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def _is_date(text: str) -> None:
    assert re.fullmatch(r"(19|20)\d\d-[01]\d( [a-z]{2,4})?", text, re.ASCII), text


def _is_choice(text: str) -> None:
    assert text in CHOICE, text


def _is_sum(text: str) -> None:
    assert re.fullmatch(r"\d(\+\d){0,4}", text, re.ASCII), text


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], None]]] = {
    "json": ({"json": SCHEMA}, _is_json),
    "regex": ({"regex": r"(19|20)[0-9]{2}-[01][0-9]( [a-z]{2,4})?"}, _is_date),
    "choice": ({"choice": CHOICE}, _is_choice),
    "grammar": ({"grammar": 'start: DIGIT ("+" DIGIT){0,4}\nDIGIT: /[0-9]/'}, _is_sum),
}


def write_model(folder: Path, listed: tuple[int, ...] = ()) -> tuple[Path, Path]:
    """(model, exits) in `folder`; exits say no more than the tokens `listed`, where there are any."""
    size = {"vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": END, "max_position_embeddings": 512}
    random_llama(folder / "model", confident=True, **size)
    write_byte_tokenizer(folder / "model")
    return folder / "model", write_exits(folder / "model", folder / "exits", listed)


def open_model(model: Path, exits: Path, topology: Topology | None = None, **keys: Any) -> EarlyExitLLM:
    """The model in float64; `keys` are those of sections."""
    own = {"model.path": str(model), "exits.path": str(exits), "model.dtype": "float64"}
    return EarlyExitLLM.from_config(load_config(None, {**own, **keys}), topology)
