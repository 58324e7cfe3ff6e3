"""Files of text, found and read one document after the other: the first step of the data's way.

A text file is one document; a .jsonl file holds one a line. Files named one by one may have any suffix; of a folder, those that end
in one of FOLDER_SUFFIXES are taken, hidden ones left out. The order is that of the names, so every machine reads the same.
"""
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ee_tuning.errors import InputError

FOLDER_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")


def find_files(paths: Sequence[str], key: str, leave_out: Iterable[Path] = ()) -> list[Path]:
    """The files that `paths` (the value of config key `key`) name, folders searched to their depth, each file once.

    Files that are also in `leave_out` are dropped. Raises InputError where a path is missing or nothing is found.
    """
    if not paths:
        raise InputError(f"{key} must name text files, .jsonl files or folders of them, got none; for example --set {key}=corpus.jsonl")
    seen = {path.resolve() for path in leave_out}
    found = []
    for name in paths:
        for path in _expand(Path(name), key):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                found.append(path)
    if not found:
        raise InputError(f"{key} = {', '.join(paths)} names no file that is not held out already; add files to train on")
    return found


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """The texts in `files`, empty ones left out. `text_key` is the key of the text in a .jsonl line.

    Raises InputError naming the file (and the line of a .jsonl) where one can not be read, is not UTF-8, or has no such text.
    """
    for path in files:
        for text in _read_jsonl(path, text_key) if path.suffix.lower() == ".jsonl" else [_read_text(path)]:
            if text:
                yield text


def _expand(path: Path, key: str) -> list[Path]:
    if not os.path.exists(path):  # unlike Path.exists, False also where a folder above may not be entered
        raise InputError(f"{key}: {path} does not exist or can not be reached; give text files, .jsonl files or folders of them")
    if not path.is_dir():
        if path.suffix.lower() == ".json":
            raise InputError(f"{key}: {path} is ambiguous; name it .jsonl if it has one object a line, .txt if plain text is meant")
        return [path]
    inside = [(file.relative_to(path).parts, file) for file in path.rglob("*") if file.suffix.lower() in FOLDER_SUFFIXES]
    files = [file for parts, file in sorted(inside) if file.is_file() and not any(part.startswith(".") for part in parts)]
    if not files:
        raise InputError(f"{key}: the folder {path} holds no {', '.join(FOLDER_SUFFIXES)} file; name files of other suffixes one by one")
    return files


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # "-sig": a byte order mark is no part of the text
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; make it readable, or leave it out") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text, got byte {error.object[error.start]:#04x} at offset {error.start}; "
                         "convert it (iconv -t utf-8), or leave it out") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of_line(line, text_key, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; make it readable, or leave it out") from error


def _text_of_line(line: bytes, text_key: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, broken UTF-8, and numbers of thousands of digits
        raise InputError(f"{where}: a line must be one JSON object in UTF-8: {error}; mend or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a line must be a JSON object, got {type(record).__name__}; write {{\"{text_key}\": \"…\"}}")
    if text_key not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where}: no key {text_key!r}, its keys are {known}; set data.text_key to that of the text")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: {text_key!r} must be a text, got {type(text).__name__}; mend the line, or set data.text_key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {text_key!r} holds half of a surrogate pair, which is no character; mend or remove the line") from error
    return text
