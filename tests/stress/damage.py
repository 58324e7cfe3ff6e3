"""Damage to any file: what disks, networks and strangers do to bytes."""

import json
import os
import random
from pathlib import Path
from typing import Any


def flip_bits(draw: random.Random, path: Path, start: int = 0, stop: int | None = None) -> Path:
    """One to three bits within the bytes `start`..`stop`."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.randrange(start, len(data) if stop is None else stop)
        data[place] ^= 1 << draw.randrange(8)
    return rewritten(path, bytes(data))


def overwrite_bytes(draw: random.Random, path: Path, start: int = 0, stop: int | None = None) -> Path:
    """A stretch of up to 64 bytes, by zeros or by noise."""
    data = bytearray(path.read_bytes())
    end = len(data) if stop is None else stop
    place = draw.randrange(start, end)
    length = min(draw.randint(1, 64), end - place)
    data[place : place + length] = bytes(length) if draw.random() < 0.5 else draw.randbytes(length)
    return rewritten(path, bytes(data))


def truncate(draw: random.Random, path: Path) -> Path:
    """A download that broke off, somewhere."""
    data = path.read_bytes()
    return rewritten(
        path, data[: draw.choice((0, draw.randrange(min(64, len(data))), draw.randrange(len(data)), len(data) - 1))]
    )


def extend(draw: random.Random, path: Path) -> Path:
    """Bytes too many at the end."""
    return rewritten(path, path.read_bytes() + draw.randbytes(draw.choice((1, 8, 1000))))


def remove(_: random.Random, path: Path) -> Path:
    """Missing."""
    path.unlink()
    return path


def replace_by_something_else(draw: random.Random, path: Path) -> Path:
    """No plain file of this folder: a link out of it, a loop of links, a pipe that nobody writes to, a folder."""
    kind = draw.choice(("link", "relative link", "loop", "pipe", "folder"))
    outside = path.parent.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "relative link":
        path.symlink_to("../outside")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    return path


HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1e400,
    1 << 63,
    10**40,
    "",
    "x",
    "\x00",
    "a\nb",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    "../" * 8 + "etc/passwd",
    "/etc/passwd",
    ".",
    "..",
    "x" * 5000,
    [[[]]],
)


def spoil_json(draw: random.Random, tree: Any) -> bytes:
    """JSON in which one value, somewhere, has become something else, is missing, or stands there twice; or that is not
    quite JSON.
    """
    places = list(_places(tree))
    parent, key = draw.choice(places)
    kind = draw.choice(("value", "value", "value", "missing", "twice", "deep", "text"))
    if kind == "value":
        parent[key] = draw.choice(HOSTILE_VALUES)
    elif kind == "missing":
        del parent[key]
    text = json.dumps(tree)
    if kind == "twice":
        word = json.dumps(str(key))
        text = text.replace(f"{word}:", f"{word}: {json.dumps(draw.choice(HOSTILE_VALUES))}, {word}:", 1)
    elif kind == "deep":
        text = "[" * 100_000 + text if draw.random() < 0.5 else '{"a":' * 100_000 + text
    elif kind == "text":
        text = draw.choice((text[:-1], text + "}", text.replace(":", "=", 1), "NaN", text.replace('"', "'")))
    data = text.encode()
    return data if draw.random() < 0.95 else data.replace(b'"', b'"\xff', 1)


def _places(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def rewritten(path: Path, data: bytes) -> Path:
    """The file, with other content."""
    path.write_bytes(data)
    return path
