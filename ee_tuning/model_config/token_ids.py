"""The special tokens that a model's files name, validated where a file is read.

Values that transformers ignores are ignored with a warning: a negative id, or one past the vocabulary. No text contains
such a token, so it can not end one. Values that are no integers are refused.
"""

from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.notices import warn_once

_GENERATION = "generation_config.json"


def end_token_ids(raw: dict[str, Any], vocab_size: int, path: Path) -> tuple[int, ...]:
    """Returns the ids of `eos_token_id` in the parsed file `path`, in order and each once; none where it is null or
    missing.

    Raises InputError where it is neither an integer nor a list of integers.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        _check_number(token, value, "eos_token_id", path)
    return tuple(dict.fromkeys(token for token in ids if _is_known(token, "eos_token_id", vocab_size, path)))


def single_token_id(raw: dict[str, Any], key: str, vocab_size: int, path: Path) -> int | None:
    """Returns the id of `key`. Raises InputError where it is no integer."""
    value = raw.get(key)
    if value is None:
        return None
    _check_number(value, value, key, path)
    return value if _is_known(value, key, vocab_size, path) else None


def generation_end_token_ids(folder: Path, vocab_size: int) -> tuple[int, ...] | None:
    """Returns the end tokens of the folder's generation_config.json, or None without such a file or value.

    Raises InputError where the file is no JSON object, or a token is no integer.
    """
    path = folder / _GENERATION
    try:
        raw = read_json(path)
    except (FileNotFoundError, NotADirectoryError):  # a GGUF file has no such file beside it
        return None
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; fetch it again, or take it away") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; fetch it again, or take it away") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(raw).__name__}; fetch it again, or take it away")
    # Not used here, but transformers reads them from an export.
    for key in (
        "bos_token_id",
        "pad_token_id",
    ):
        single_token_id(raw, key, vocab_size, path)
    return None if raw.get("eos_token_id") is None else end_token_ids(raw, vocab_size, path)


def _check_number(token: Any, value: Any, key: str, path: Path) -> None:
    if type(token) is not int:
        rule = "the number of a token, or a list of such" if key == "eos_token_id" else "the number of a token, or null"
        raise InputError(f"{path}: {key} must be {rule}, got {value!r}; write it as the tokenizer's files number it")


def _is_known(token: int, key: str, vocab_size: int, path: Path) -> bool:
    if 0 <= token < vocab_size:
        return True
    if token >= 0 or key == "eos_token_id":  # -1 is an old way to say none
        meaning = "no text ends by it" if key == "eos_token_id" else "it is taken as not set"
        warn_once(
            f"{path}: {key} names {token}, which is no token of the vocabulary of {vocab_size}: {meaning}, as with transformers"
        )
    return False
