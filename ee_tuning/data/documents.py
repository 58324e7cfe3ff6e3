"""Files of text, read one document after the other, in pieces that processes can share: the first step of the data's way.

A text file is one document; a .jsonl file holds one a line, a .parquet file one a row: a text, or the messages of a chat.
"""
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ee_tuning.data.parquet import read_rows, row_groups
from ee_tuning.errors import InputError
from ee_tuning.line_file import line_text

PIECE_BYTES = 4_000_000
MESSAGES = "messages"


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read by itself."""

    path: Path
    start: int
    """First byte; of a .parquet file, its first row group."""
    stop: int
    """Behind the last."""
    num_bytes: int
    """How much work it is."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    """What the assistant may call, as the chat template takes it."""
    where: Callable[[], str]
    """Its place, for errors."""


Document = str | Conversation


def pieces_of(files: Iterable[Path]) -> list[Piece]:
    """`files` in pieces, in order. Raises InputError where one can not be looked at."""
    pieces = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            pieces += [Piece(path, group, group + 1, size) for group, size in enumerate(row_groups(path))]
            continue
        size = _readable(path, path.stat).st_size
        step = PIECE_BYTES if suffix == ".jsonl" else max(size, 1)
        pieces += [Piece(path, start, min(start + step, size), min(step, size - start)) for start in range(0, size, step)]
    return pieces


def read_documents(piece: Piece, text_key: str) -> Iterator[Document]:
    """The documents that begin in `piece`, empty ones left out. `text_key` is the key of the text in a .jsonl line or of its column.

    Raises InputError naming the file (and the line of a .jsonl) where one can not be read, is not UTF-8, or has no such text.
    """
    suffix = piece.path.suffix.lower()
    if suffix == ".jsonl":
        documents = _read_jsonl(piece, text_key)
    elif suffix == ".parquet":
        rows = read_rows(piece.path, piece.start, piece.stop, (text_key, MESSAGES))
        documents = (_document_of(row, text_key, partial("{}, row {}".format, piece.path, number)) for number, row in rows)
    else:
        documents = iter([_read_text(piece.path)])
    return (document for document in documents if document)


def _readable(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; make it readable, or leave it out") from error


def _read_text(path: Path) -> str:
    content = _readable(path, path.read_bytes)
    try:
        return content.decode("utf-8-sig")  # "-sig": a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text, got byte {error.object[error.start]:#04x} at offset {error.start}; "
                         "convert it (iconv -t utf-8), or leave it out") from error


def _read_jsonl(piece: Piece, text_key: str) -> Iterator[Document]:
    """The lines that begin within the piece: a line that reaches into the next one belongs to this."""
    with _readable(piece.path, lambda: piece.path.open("rb")) as lines:
        if piece.start:
            lines.seek(piece.start - 1)
            _readable(piece.path, lines.readline)
        while (place := lines.tell()) < piece.stop:
            line = _readable(piece.path, lines.readline)
            if line.strip():
                yield _document_of_line(line, text_key, partial(_place_of_line, piece.path, place))


def _place_of_line(path: Path, place: int) -> str:
    """Of the line that begins at byte `place`; counted only when an error asks for it."""
    number = 1
    with path.open("rb") as file:
        while place > 0 and (block := file.read(min(place, 1 << 20))):
            number += block.count(b"\n")
            place -= len(block)
    return f"{path}:{number}"


def _document_of_line(line: bytes, text_key: str, where: Callable[[], str]) -> Document:
    try:
        record = json.loads(line_text(line))
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, broken UTF-8, and numbers of thousands of digits
        raise InputError(f"{where()}: a line must be one JSON object in UTF-8: {error}; mend or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(f"{where()}: a line must be a JSON object, got {type(record).__name__}; write {{\"{text_key}\": \"…\"}}")
    return _document_of(record, text_key, where)


def _document_of(record: dict[str, Any], text_key: str, where: Callable[[], str]) -> Document:
    if record.get(MESSAGES) is not None and record.get(text_key) is None:
        return _conversation(record, where)
    if text_key not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise InputError(f"{where()}: no key {text_key!r} and no {MESSAGES!r}, its keys are {known}; set data.text_key to that of the text")
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where()}: {text_key!r} must be a text, got {type(text).__name__}; mend it, or set data.text_key")
    check_characters(text, text_key, where)
    return text


def _conversation(record: dict[str, Any], where: Callable[[], str]) -> Conversation:
    messages = record[MESSAGES]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where()}: {MESSAGES!r} must be a list of messages, got {messages!r}"[:300] + "; mend or remove it")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where()}: each of {MESSAGES!r} must be an object with role and content, got {message!r}"[:300]
                             + "; mend or remove it")
    tools = record.get("tools")
    # Of roles, names and calls of tools, too. Not every value of .parquet is one of JSON's.
    check_characters(json.dumps([messages, tools], ensure_ascii=False, default=str), MESSAGES, where)
    # .parquet has a value for each key that any message has; templates ask whether a key is there.
    messages = [{key: value for key, value in message.items() if value is not None or key == "content"} for message in messages]
    return Conversation(messages, tools if isinstance(tools, list) else None, where)


def check_characters(text: str, key: str, where: Callable[[], str]) -> None:
    """Raises InputError, naming the key and its place, where `text` can not be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where()}: {key!r} holds half of a surrogate pair, which is no character; mend or remove it") from error
