"""Resolves data.paths: files to tokenize and files of token ids, as one corpus or as a blend of weighted ones.

In a folder, files with the suffixes of data are taken, recursively and in the order of their names, so every machine
reads the same. Skipped are hidden files, descriptions of a folder (README, LICENSE, JSON files of models and data
sets), JSON and tables without texts, other suffixes, and folders that this project wrote. Files named explicitly may
have any name.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.config.paths import is_number
from ee_tuning.data.documents import may_hold_records
from ee_tuning.data.file_kind import DATA_SUFFIXES, named_format
from ee_tuning.data.tally import listed
from ee_tuning.errors import InputError
from ee_tuning.storage.apart import is_ours

INDEX_SUFFIX, BIN_SUFFIX = ".idx", ".bin"
_BESIDE_DATA = (BIN_SUFFIX, ".mask")
"""Skipped silently: they belong to an .idx."""
_DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing|citation|authors|code_of_conduct|security)([._-].*)?"
    r"|(dataset_infos?|dataset_dict|state|config|generation_config|.*tokenizer.*|special_tokens_map|vocab|.*\.index"
    r"|manifest|exit_config)\.json|cache-.*\.arrow",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The files under one weight."""

    name: str
    """The name as the user wrote it."""
    weight: float | None
    """Its share of the samples, not normalized; None where all of data.paths is one corpus."""
    texts: tuple[Path, ...]
    """Files to tokenize."""
    prefixes: tuple[Path, ...]
    """Paths of .bin and .idx, without these suffixes."""
    passed_over: tuple[str, ...] = ()
    """Paths within folders that were skipped, without hidden files."""


def find_corpora(paths: Sequence[str], key: str, text_key: str, leave_out: Iterable[Corpus] = ()) -> list[Corpus]:
    """Returns the corpora of `paths` (the value of config key `key`), with each file once. `text_key` is the key of
    texts.

    Files that are also in `leave_out` are dropped. Raises InputError where a path is missing, a weight is no number, or
    nothing is found.
    """
    if not paths:
        raise InputError(
            f"{key} must name text files, .jsonl, .json, .csv, .parquet, .bin with .idx, or folders of them, got none; "
            f"for example --set {key}=corpus.jsonl"
        )
    seen = {path.resolve() for corpus in leave_out for path in (*corpus.texts, *corpus.prefixes)}
    corpora = []
    for weight, names in _weighed(paths, key):
        found: dict[str, list[Path]] = {"texts": [], "prefixes": []}
        passed_over: list[str] = []
        for name in names:
            for path in _expand(Path(name), key, text_key, passed_over):
                kind = "prefixes" if path.suffix.lower() == INDEX_SUFFIX else "texts"
                path = path.with_suffix("") if kind == "prefixes" else path
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    found[kind].append(path)
        if not any(found.values()):
            raise InputError(
                f"{key} = {', '.join(names)} names no file that is not held out already, or named before; add other files"
            )
        corpora.append(
            Corpus(
                name=", ".join(names),
                weight=weight,
                texts=tuple(found["texts"]),
                prefixes=tuple(found["prefixes"]),
                passed_over=tuple(passed_over),
            )
        )
    return corpora


def _weighed(paths: Sequence[str], key: str) -> list[tuple[float | None, Sequence[str]]]:
    """Returns [(None, all paths)] or, where a path is a number and no file, a weight and a path for each corpus."""
    if not any(is_number(path) and not os.path.exists(path) for path in paths):
        return [(None, paths)]
    blend: list[tuple[float | None, Sequence[str]]] = []
    for index in range(0, len(paths), 2):
        weight = float(paths[index]) if is_number(paths[index]) else 0.0
        if not 0 < weight < math.inf:
            raise InputError(
                f"{key}: a blend is a weight above 0 before each path, such as 0.3 corpus_a 0.7 corpus_b, got "
                f"{paths[index]!r} where a weight belongs; give every path a weight, or none"
            )
        if index + 1 == len(paths):
            raise InputError(
                f"{key}: the weight {paths[index]} has no path after it; a blend is a weight before each path"
            )
        blend.append((weight, paths[index + 1 : index + 2]))
    return blend


def _expand(path: Path, key: str, text_key: str, passed_over: list[str]) -> list[Path]:
    """Returns the files that `path` stands for, an .idx for .bin and .idx. Appends the files it skips to
    `passed_over`.
    """
    index, tokens = (Path(f"{path}{suffix}") for suffix in (INDEX_SUFFIX, BIN_SUFFIX))
    if path.suffix.lower() in (INDEX_SUFFIX, BIN_SUFFIX) and not path.is_dir():
        index, tokens = path.with_suffix(INDEX_SUFFIX), path.with_suffix(BIN_SUFFIX)
    if os.path.exists(index) or os.path.exists(tokens):
        for one, other in ((index, tokens), (tokens, index)):
            if not os.path.exists(one):
                raise InputError(
                    f"{key}: {other} needs {one} beside it, which is missing; copy it there, or name another file"
                )
        return [index]
    if not os.path.exists(path):  # unlike Path.exists, False also where a parent folder may not be entered
        raise InputError(
            f"{key}: {path} does not exist or can not be reached; give text files, .jsonl, .parquet, the prefix of .bin and "
            ".idx, or folders of them"
        )
    if not path.is_dir():
        return [path]
    others: list[str] = []
    if not (files := sorted(_within(path, path, text_key, others))):
        others_text = f" (passed over: {listed(others)})" if others else ""
        raise InputError(
            f"{key}: the folder {path} holds no {', '.join((*DATA_SUFFIXES, INDEX_SUFFIX))} file{others_text}; name files of other "
            "endings one by one"
        )
    passed_over += others
    return [file for _, file in files]


def _within(folder: Path, top: Path, text_key: str, passed_over: list[str]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yields the data files of a folder: their parts within `top`, by which they are sorted, and their paths."""
    for path in sorted(folder.iterdir()):
        inner = path.relative_to(top)
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if is_ours(path):
                passed_over.append(f"{inner}/ (written by ee-tuning)")
            elif not path.is_symlink():
                yield from _within(path, top, text_key, passed_over)
        elif path.is_file() and not _DESCRIPTIONS.fullmatch(path.name) and _is_data(path):
            if may_hold_records(path, text_key):
                yield inner.parts, path
            else:
                passed_over.append(f"{inner} (no {text_key}, and no chat or prompt)")
        elif path.suffix not in _BESIDE_DATA:
            passed_over.append(str(inner))


def _is_data(path: Path) -> bool:
    return path.suffix.lower() == INDEX_SUFFIX or named_format(path.name) is not None
