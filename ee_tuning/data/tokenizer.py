"""The tokenizer of a model, from its folder or the hub. Code in that folder does not run without permission."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.checkpoint.gguf_file import is_gguf, tokenizer_digest
from ee_tuning.checkpoint.hub import fetch_tokenizer, hub_name
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content
from ee_tuning.questions import no_questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_COMPANIONS = (
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"
"""Subfolder with further chat templates, one per name."""
_ASKS_FOR_TRUST = "trust_remote_code"
"""Part of transformers' message when it refuses to run a folder's code."""


def load_tokenizer(path: str | Path, *, trusts_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the Hugging Face tokenizer from the folder or GGUF file `path`, or from the hub.

    Python files of the folder run only if `trusts_code`. Raises InputError where the folder is missing, has no
    tokenizer files, has files that transformers can not read, or needs untrusted code.
    """
    folder = tokenizer_folder(path, trusts_code=trusts_code)
    import transformers  # takes seconds, so only commands that tokenize import it

    transformers.logging.set_verbosity_error()
    # A GGUF file contains its tokenizer and its chat template.
    place = (
        {"pretrained_model_name_or_path": str(folder)}
        if not is_gguf(folder)
        else {"pretrained_model_name_or_path": str(folder.parent), "gguf_file": folder.name}
    )
    try:
        with no_questions():
            tokenizer = _opened({**place, "local_files_only": True}, trusts_code)
    except Exception as error:  # the Rust tokenizers raise bare Exception on a broken file
        if not trusts_code and _ASKS_FOR_TRUST in str(error):
            raise InputError(
                f"the tokenizer in {folder} needs Python code that its files name, and no code of a folder is run unasked; "
                "read that code and give --trust-remote-code, or name another --tokenizer"
            ) from error
        if _wants_sentencepiece(folder) and not find_spec("sentencepiece"):
            raise InputError(
                f"{folder / 'tokenizer.model'} is read by the package sentencepiece, which is not installed; pip install "
                "sentencepiece, or put the model's tokenizer.json beside it"
            ) from error
        reason = " ".join(str(error).split())[:300]
        for name in TOKENIZER_FILES:
            if content := describe_content(folder / name):
                raise InputError(f"{folder / name} {content}") from error
        raise InputError(
            f"the tokenizer in {folder} can not be read: {reason}; copy its files again, or set data.tokenizer"
        ) from error
    if not isinstance(tokenizer.model_max_length, int | float):  # compared with the length of each text later
        raise InputError(
            f"model_max_length in {folder / 'tokenizer_config.json'} must be a number, got "
            f"{tokenizer.model_max_length!r:.60}; copy the tokenizer's files again"
        )
    return tokenizer


def _opened(place: dict[str, Any], trusts_code: bool) -> "PreTrainedTokenizerBase":
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=trusts_code)
    except StrictDataclassError:
        # The model's config.json is not used: transformers' types are strict there, and the tokenizer needs nothing of
        # it.
        return transformers.AutoTokenizer.from_pretrained(
            **place, trust_remote_code=trusts_code, config=transformers.PretrainedConfig()
        )


def _wants_sentencepiece(folder: Path) -> bool:
    path = folder / "tokenizer.model"
    # Tiktoken's files are lines of text.
    return path.is_file() and not (folder / "tokenizer.json").is_file() and path.read_bytes()[:1] == b"\n"


def tokenizer_digests(path: str | Path, *, trusts_code: bool = False) -> dict[str, str]:
    """Returns the sha256 of each file that may belong to a tokenizer, trusted code included.

    Raises InputError where the folder is missing or has no tokenizer files.
    """
    folder = tokenizer_folder(path, trusts_code=trusts_code)
    if is_gguf(folder):
        return {folder.name: tokenizer_digest(folder)}
    files = [folder / name for name in (*TOKENIZER_FILES, *_COMPANIONS)] + sorted(
        folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")
    )
    files += sorted(folder.glob("*.py")) if trusts_code else []
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def tokenizer_of(config: Config) -> str:
    """Returns the folder, or the name on the hub, of a job's tokenizer: data.tokenizer, or the model's own."""
    own = config.model.path
    return config.data.tokenizer or (own if hub_name(own) else str(model_folder(own)))


def tokenizer_folder(path: str | Path, *, trusts_code: bool = False) -> Path:
    """Returns the folder `path`, or the download of the hub's `org/name@revision`. Raises InputError without tokenizer
    files.
    """
    folder = Path(path)
    if is_gguf(folder):
        return folder
    if name := hub_name(str(path)):
        folder = fetch_tokenizer(name, with_code=trusts_code)
    if not folder.is_dir():
        raise InputError(
            f"the tokenizer must be a folder, got {str(path)!r}; set data.tokenizer (or model.path) to such a folder"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's there, or set data.tokenizer"
        )
    return folder


def end_of_text_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the token that ends a document. Raises InputError where the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} must have an end-of-text token, got none; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def beginning_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the token ids that the tokenizer puts before any text: usually its beginning-of-text token, or none."""
    bare, whole = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    return next((whole[:place] for place in range(len(whole)) if whole[place : place + len(bare)] == bare), [])


def begun(ids: list[int], beginning: list[int]) -> list[int]:
    """Puts `beginning` before `ids`, unless the text already begins with it."""
    return ids if ids[: len(beginning)] == beginning else [*beginning, *ids]
