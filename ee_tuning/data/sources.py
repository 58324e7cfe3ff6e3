"""What data.paths names: files to tokenize and files of token ids, alone or as a blend of weighted corpora.

Of a folder, the files that end in one of FOLDER_SUFFIXES are taken, to its depth, hidden ones left out, in the order of their names, so
every machine reads the same. Files named one by one may have any suffix.
"""
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.errors import InputError

INDEX_SUFFIX, BIN_SUFFIX = ".idx", ".bin"
FOLDER_SUFFIXES = (".idx", ".jsonl", ".md", ".parquet", ".py", ".rst", ".txt")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What one weight stands for."""

    name: str
    """As the user wrote it."""
    weight: float | None
    """Its share of the samples, not normalized; None where all of data.paths is one corpus."""
    texts: tuple[Path, ...]
    """Files to tokenize."""
    prefixes: tuple[Path, ...]
    """Of .bin and .idx."""


def find_corpora(paths: Sequence[str], key: str, leave_out: Iterable[Corpus] = ()) -> list[Corpus]:
    """The corpora that `paths` (the value of config key `key`) name, each file once.

    Files that are also in `leave_out` are dropped. Raises InputError where a path is missing, a weight is no number, or nothing is found.
    """
    if not paths:
        raise InputError(f"{key} must name text files, .jsonl, .parquet, .bin with .idx, or folders of them, got none; "
                         f"for example --set {key}=corpus.jsonl")
    seen = {path.resolve() for corpus in leave_out for path in (*corpus.texts, *corpus.prefixes)}
    corpora = []
    for weight, names in _weighed(paths, key):
        found: dict[str, list[Path]] = {"texts": [], "prefixes": []}
        for name in names:
            for path in _expand(Path(name), key):
                kind = "prefixes" if path.suffix.lower() == INDEX_SUFFIX else "texts"
                path = path.with_suffix("") if kind == "prefixes" else path
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    found[kind].append(path)
        if not any(found.values()):
            raise InputError(f"{key} = {', '.join(names)} names no file that is not held out already, or named before; add other files")
        corpora.append(Corpus(name=", ".join(names), weight=weight, texts=tuple(found["texts"]), prefixes=tuple(found["prefixes"])))
    return corpora


def _weighed(paths: Sequence[str], key: str) -> list[tuple[float | None, Sequence[str]]]:
    """[(None, all paths)], or, where a path is a number and no file, a weight and a path for each corpus."""
    if not any(_number(path) is not None and not os.path.exists(path) for path in paths):
        return [(None, paths)]
    blend: list[tuple[float | None, Sequence[str]]] = []
    for index in range(0, len(paths), 2):
        weight = _number(paths[index])
        if weight is None or not 0 < weight < math.inf:
            raise InputError(f"{key}: a blend is a weight above 0 before each path, such as 0.3 corpus_a 0.7 corpus_b, got "
                             f"{paths[index]!r} where a weight belongs; give every path a weight, or none")
        if index + 1 == len(paths):
            raise InputError(f"{key}: the weight {paths[index]} has no path after it; a blend is a weight before each path")
        blend.append((weight, paths[index + 1: index + 2]))
    return blend


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _expand(path: Path, key: str) -> list[Path]:
    """The files that `path` stands for; of .bin and .idx, the .idx."""
    index, tokens = (path.with_name(path.name + suffix) for suffix in (INDEX_SUFFIX, BIN_SUFFIX))
    if path.suffix.lower() in (INDEX_SUFFIX, BIN_SUFFIX) and not path.is_dir():
        index, tokens = path.with_suffix(INDEX_SUFFIX), path.with_suffix(BIN_SUFFIX)
    if os.path.exists(index) or os.path.exists(tokens):
        for one, other in ((index, tokens), (tokens, index)):
            if not os.path.exists(one):
                raise InputError(f"{key}: {other} needs {one} beside it, which is missing; copy it there, or name another file")
        return [index]
    if not os.path.exists(path):  # unlike Path.exists, False also where a folder above may not be entered
        raise InputError(f"{key}: {path} does not exist or can not be reached; give text files, .jsonl, .parquet, the prefix of .bin and "
                         ".idx, or folders of them")
    if not path.is_dir():
        if path.suffix.lower() == ".json":
            raise InputError(f"{key}: {path} is ambiguous; name it .jsonl if it has one object a line, .txt if plain text is meant")
        return [path]
    inside = [(file.relative_to(path).parts, file) for file in path.rglob("*") if file.suffix.lower() in FOLDER_SUFFIXES]
    files = [file for parts, file in sorted(inside) if file.is_file() and not any(part.startswith(".") for part in parts)]
    if not files:
        raise InputError(f"{key}: the folder {path} holds no {', '.join(FOLDER_SUFFIXES)} file; name files of other suffixes one by one")
    return files
