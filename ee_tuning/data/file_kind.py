"""Detects the kind of a data file: format by name or content, compression by the first bytes."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import GIT_LFS

Format = Literal["text", "lines", "json", "table", "parquet", "arrow"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".ldjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".md": "text",
    ".py": "text",
    ".rst": "text",
    ".txt": "text",
}
PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
DATA_SUFFIXES = tuple(_FORMATS)
"""Suffixes of files that are taken from a folder, compressed or not."""
_REFUSED = {
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".7z": "unpack it",
    ".rar": "unpack it",
    ".lz4": "unpack it",
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".xlsx", ".xls"), "save it as text, or as .csv"),
    **dict.fromkeys(
        (
            ".pkl",
            ".pickle",
            ".pt",
            ".pth",
            ".npy",
            ".npz",
            ".safetensors",
            ".gguf",
            ".h5",
            ".hdf5",
            ".feather",
            ".avro",
            ".orc",
            ".msgpack",
            ".tfrecord",
            ".db",
            ".sqlite",
            ".mds",
        ),
        "write it as .jsonl or .parquet",
    ),
}
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class FileKind:
    """Format and compression of a file."""

    format: Format
    packing: str | None = None
    """gzip, zstd, bzip2 or xz."""


def named_format(name: str) -> Format | None:
    """Returns the format that a file's suffixes stand for, or None."""
    return _FORMATS.get(_inner_suffix(name))


def kind_of(path: Path) -> FileKind:
    """Detects the kind of a file. Raises InputError where it can not be read or its kind is not supported."""
    suffix = _inner_suffix(path.name)
    if remedy := _REFUSED.get(suffix):
        raise InputError(f"{path}: {suffix} is no format that data are read from; {remedy}")
    with opened(path, None) as file:
        packing = _packing(file.read(6))
    promised = _FORMATS.get(suffix)
    with opened(path, packing) as file:
        head = file.read(_HEAD_BYTES if promised in (None, "json") else len(GIT_LFS))
    if head.startswith(GIT_LFS):
        raise InputError(f"{path} is a pointer of Git LFS instead of the file; fetch it with `git lfs pull`")
    found = promised or _format_of(head)
    if packing and found in ("parquet", "arrow"):
        raise InputError(f"{path}: {found} must not be compressed, and this is {packing}; decompress it")
    return FileKind(_json_or_lines(head) if found == "json" else found, packing)


@contextmanager
def opened(path: Path, packing: str | None) -> Iterator[IO[bytes]]:
    """Opens the file and decompresses it. Raises InputError, also from within the block, where it can not be read."""
    try:
        with _openers()[packing](path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if packing is None or (isinstance(error, OSError) and error.errno):
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} can not be read: {reason}; make it readable, or leave it out") from error
        raise InputError(f"{path} can not be read as {packing}: {error}; copy it again, or leave it out") from error


def check_no_lines(text: str, path: Path) -> None:
    """Raises InputError where a text file holds JSON lines, which would become one document with all its braces."""
    if _holds_objects(text[:_HEAD_BYTES].encode(), least=1):
        raise InputError(
            f"{path} holds JSON lines, and its name promises plain text; name it .jsonl, or write it as one "
            '{"text": "…"} in a .jsonl if its braces are meant'
        )


def _inner_suffix(name: str) -> str:
    """Returns the lowercase suffix without those of compression."""
    path = Path(name.lower())
    while path.suffix in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix


def _packing(first: bytes) -> str | None:
    magic = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
    return next((packing for bytes_, packing in magic.items() if first.startswith(bytes_)), None)


def _openers() -> dict[str | None, Callable[[Path], Any]]:
    return {
        None: lambda path: path.open("rb"),
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": _open_zstd,
    }


@contextmanager
def _open_zstd(path: Path) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{path}: reading zstd needs zstandard, which is not installed; pip install 'ee_tuning[zstd]', or unpack the "
            "file (zstd -d)"
        ) from error
    try:
        with path.open("rb") as packed:
            # Parallel compressors write several frames; `zstd --long` writes windows of up to 2 GiB.
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(packed, read_across_frames=True)
            with io.BufferedReader(reader, 1 << 16) as file:
                yield file
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error


def _format_of(head: bytes) -> Format:
    """Detects the format of a file whose name does not say it."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if _holds_objects(head, least=1):
        return "lines"
    return "json" if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"[{", b"[\n", b"[ ", b"[\r")) else "text"


def _json_or_lines(head: bytes) -> Format:
    """Distinguishes JSON lines, which are read in ranges, from other .json files."""
    return "lines" if _holds_objects(head, least=2) else "json"


def _holds_objects(head: bytes, least: int) -> bool:
    """Whether the first two lines that are not blank are JSON objects with keys, or `least` lines if there are no
    more.
    """
    lines = [line for line in head.split(b"\n") if line.strip(b"\xef\xbb\xbf \t\r")]
    is_cut = len(head) >= _HEAD_BYTES
    if is_cut and len(lines) == 1:
        return lines[0].lstrip(b"\xef\xbb\xbf \t").startswith(b'{"')
    lines = lines[: len(lines) - is_cut][:2]
    return len(lines) >= least and all(map(_is_object, lines))


def _is_object(line: bytes) -> bool:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)
