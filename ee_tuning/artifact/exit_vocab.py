"""`exit_vocab.json`: the shortlist of an artifact's exits. Any other token is one more class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json, to_json

VOCAB = "exit_vocab.json"
_REMEDY = "fetch or convert the exits again"


def write_token_ids(folder: Path, token_ids: Sequence[int]) -> None:
    """Writes the list, unless it is empty."""
    if token_ids:
        (folder / VOCAB).write_text(to_json({"token_ids": list(token_ids)}) + "\n", encoding="utf-8")


def read_id_list(path: Path, remedy: str) -> list[int]:
    """Reads token ids from a JSON list, or from an object with the key `token_ids`.

    Raises InputError, with the path and `remedy`, where the file holds neither.
    """
    try:
        tree = read_json(path)
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; {remedy}") from error
    ids = tree.get("token_ids") if isinstance(tree, dict) else tree
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise InputError(f"{path} must hold token_ids, a list of token ids; {remedy}")
    return ids


def read_token_ids(folder: Path, count: int, vocab_size: Any) -> tuple[int, ...]:
    """Reads the increasing ids.

    Raises InputError, naming the file, where it does not hold `count` increasing ids below `vocab_size`.
    """
    path = folder / VOCAB
    ids = read_id_list(path, _REMEDY)
    if len(ids) != count:
        raise InputError(
            f"{path} must hold {count} token ids, as exit_config.json says, and holds {len(ids)}; {_REMEDY}"
        )
    for before, token in zip([-1, *ids], ids, strict=False):
        if token <= before:
            raise InputError(
                f"{path} must hold different token ids in increasing order, got {token} behind {before}; {_REMEDY}"
            )
    if isinstance(vocab_size, int) and ids[-1] >= vocab_size:
        raise InputError(f"{path} must hold ids of the model's vocabulary of {vocab_size}, got {ids[-1]}; {_REMEDY}")
    return tuple(ids)
