"""Models and tokenizers from the Hugging Face hub. Only the files that are read are downloaded, to Hugging Face's
cache.

A repository may hold a model several times, in other formats and precisions, which would take long to download.
"""

import glob
import json
import re
from pathlib import Path
from typing import NamedTuple

from ee_tuning.errors import InputError
from ee_tuning.storage.manifest import MANIFEST, holds_manifest, read_manifest

_NAME = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?:@(\w[\w./-]*))?")
_CONFIG = ["config.json"]
_TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]
_CODE = ["*.py"]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_MODEL = [
    *_CONFIG,
    *_TOKENIZER,
    "generation_config.json",
    MANIFEST,
    _INDEX,
    _ADAPTER,
    *_CODE,
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]
"""All files but the weights. Exports include code and licences."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx")


class HubName(NamedTuple):
    """org/name, or name, and @revision."""

    repository: str
    revision: str | None
    """A branch, a tag or a commit; None for the main branch."""

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


_COMMITS: dict[HubName, HubName] = {}
"""Commits by the names that this process has used, so that all files are of one commit even if a branch moves."""


def hub_name(text: str) -> HubName | None:
    """Parses a name on the hub. Returns None where `text` is an existing path or no valid name."""
    found = _NAME.fullmatch(text)
    return HubName(*found.groups()) if found and not Path(text).exists() and ".." not in text else None


def fetch_model(name: HubName, *, needs_weights: bool) -> Path:
    """Returns the folder in Hugging Face's cache with the hub's model: its config.json, or all files that are read.

    Raises InputError where the hub does not provide it, or its weights are in no supported form.
    """
    folder = _fetched(name, _MODEL if needs_weights else [*_CONFIG, _ADAPTER])
    commit = HubName(name.repository, folder.name)
    if (folder / _ADAPTER).is_file():
        return folder  # refused when the model is opened
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name} on the hub must hold a config.json, and holds {_other_weights(commit)}; give the model as transformers "
            "saves it, or fetch a GGUF file and give that"
        )
    if not needs_weights:
        return folder
    if holds_manifest(folder):  # the manifest's files are all read for the check
        return _with(folder, commit, list(read_manifest(folder, "fetch the model from elsewhere")))
    if (folder / _INDEX).is_file() and not (folder / _SINGLE).exists() and not _holds(commit, _SINGLE):
        return _with(folder, commit, _shards(folder / _INDEX))
    if not (_with(folder, commit, [_SINGLE]) / _SINGLE).exists():
        raise InputError(
            f"{name} on the hub must hold {_SINGLE} or {_INDEX}, and holds {_other_weights(commit)}; give a repository, or a "
            "revision (org/name@revision), with safetensors"
        )
    return folder


def fetch_tokenizer(name: HubName, *, with_code: bool) -> Path:
    """Returns the folder in Hugging Face's cache with the tokenizer's files and, `with_code`, the repository's Python
    files.

    Raises InputError where the hub does not provide it.
    """
    folder = _fetched(name, [*_CONFIG, *_TOKENIZER, *(_CODE if with_code else [])])
    if not folder.is_dir():
        raise InputError(f"{name} on the hub holds no file of a tokenizer; give another --tokenizer")
    return folder


def _shards(index: Path) -> list[str]:
    """Returns the names of the shards. A broken index is reported later, when its tensors are read."""
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _with(folder: Path, commit: HubName, files: list[str]) -> Path:
    """Downloads `files` of `commit` to `folder`."""
    missing = [glob.escape(file) for file in files if not (folder / file).exists()]
    return _fetched(commit, missing, is_large=True) if missing else folder


def _fetched(name: HubName, files: list[str], *, is_large: bool = False) -> Path:
    """Returns the cached snapshot with the files that match the patterns `files`. Shows progress if it `is_large`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    known = _COMMITS.get(name, name)
    try:
        folder = _snapshot(known, files, is_large)
        _COMMITS[name] = HubName(name.repository, folder.name)
        return folder
    except GatedRepoError as error:
        raise InputError(
            f"{name} on the hub is for accounts that were let in; ask on its page, and log in (hf auth login, or set HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {name}, and no such model on the Hugging Face hub, or not for this account; check the name, "
            "log in (hf auth login, or set HF_TOKEN), or give a folder"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name.repository} on the hub has no revision {name.revision!r}; give a branch, a tag or a commit"
        ) from error
    except Exception as error:  # network errors, whose classes depend on the libraries underneath
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(
            f"there is no folder {name}, and the Hugging Face hub can not be asked for it ({reason}); "
            "check the name and the network, or give a folder"
        ) from error


def _snapshot(name: HubName, files: list[str], shows_progress: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    logging.set_verbosity_error()  # it warns where no file matches
    is_silenced = not shows_progress and not are_progress_bars_disabled()
    if is_silenced:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name.repository, revision=name.revision, allow_patterns=files))
    finally:
        if is_silenced:
            enable_progress_bars()


def _holds(name: HubName, file: str) -> bool:
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().file_exists(name.repository, file, revision=name.revision)
    except Exception:  # offline, for example: the answer is not available
        return False


def _other_weights(name: HubName) -> str:
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(name.repository, revision=name.revision)
    except Exception:
        return "no such file"
    return ", ".join(sorted(file for file in files if Path(file).suffix in _WEIGHTS)[:3]) or "no weights"
