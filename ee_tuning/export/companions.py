"""Finds the files of a model beside weights and config.json: tokenizer, generation defaults, licence, code."""

from collections.abc import Callable
from pathlib import Path

from ee_tuning.artifact.exit_config import CONFIG
from ee_tuning.errors import InputError
from ee_tuning.export.export_source import ExportSource
from ee_tuning.storage.manifest import MANIFEST, file_names

MODELLING = Path(__file__).parent / "exported" / "modeling_early_exit.py"
"""The modelling file of merged exports, which is not copied from a model."""
_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.json",
}


def companions(model: ExportSource, tokenizer: Path | None) -> dict[str, Path]:
    """Returns name -> file of the files beside the weights of a Hugging Face folder.

    The tokenizer's files come from the folder `tokenizer`, if given. Raises InputError if that folder has none.
    """
    folder = model.source.folder
    found = _named(folder, _belongs) if model.has_companions else {}
    if tokenizer is not None:
        own = _named(tokenizer, is_tokenizer_file)
        if not own:
            raise InputError(
                f"--tokenizer must be a folder with a tokenizer's files, and {tokenizer} holds none of them"
            )
        found = (
            {name: path for name, path in found.items() if not is_tokenizer_file(name)}
            | own
            | _named(tokenizer, _is_code)
        )
    return found


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of that name belongs to a tokenizer saved by transformers."""
    return name in _TOKENIZER_FILES or Path(name).suffix in (".model", ".jinja", ".tiktoken")


def _named(folder: Path, belongs: Callable[[str], bool]) -> dict[str, Path]:
    return {name: folder / name for name in file_names(folder) if (folder / name).is_file() and belongs(name)}


def _belongs(name: str) -> bool:
    if name in (MANIFEST, "config.json", CONFIG) or name.endswith(".index.json"):
        return False
    return (
        Path(name).suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
        or _is_code(name)
        or name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))
    )


def _is_code(name: str) -> bool:
    """Whether a file is Python code of the model or tokenizer, which its configs may name."""
    return Path(name).suffix == ".py" and name != MODELLING.name
