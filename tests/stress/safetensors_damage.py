"""Damage to a folder of safetensors: bytes, headers that lie, tensors that are not where they should be, indices that
lead elsewhere.
"""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from damage import (
    HOSTILE_VALUES,
    extend,
    flip_bits,
    overwrite_bytes,
    remove,
    replace_by_something_else,
    rewritten,
    spoil_json,
    truncate,
)

Tree = dict[str, Any]


def weights(folder: Path) -> list[Path]:
    """The folder's shards."""
    return sorted(folder.glob("*.safetensors"))


def index_of(folder: Path) -> Path | None:
    """The index of a sharded folder."""
    return next(folder.glob("*.safetensors.index.json"), None)


def _on_a_shard(damage: Callable[[random.Random, Path], Path], draw: random.Random, folder: Path) -> Path:
    return damage(draw, draw.choice(weights(folder)))


def _parts(path: Path) -> tuple[Tree, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _joined(path: Path, tree: Tree | bytes, data: bytes) -> Path:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return rewritten(path, len(text).to_bytes(8, "little") + text + data)


def _tensors(tree: Tree) -> list[str]:
    return [name for name in tree if name != "__metadata__"]


def _header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def header_bits(draw: random.Random, path: Path) -> Path:
    """Flipped bits in length and header."""
    return flip_bits(draw, path, 0, _header_end(path))


def header_noise(draw: random.Random, path: Path) -> Path:
    """A stretch of the header lost."""
    return overwrite_bytes(draw, path, 0, _header_end(path))


def data_bits(draw: random.Random, path: Path) -> Path:
    """Flipped bits in a weight."""
    return flip_bits(draw, path, _header_end(path))


def data_noise(draw: random.Random, path: Path) -> Path:
    """A stretch of weights lost."""
    return overwrite_bytes(draw, path, _header_end(path))


def header_length(draw: random.Random, path: Path) -> Path:
    """Another length of the header, up to one beyond any memory."""
    data = path.read_bytes()
    true = int.from_bytes(data[:8], "little")
    said = draw.choice(
        (
            0,
            1,
            true - 1,
            true + 1,
            true + 8,
            len(data),
            len(data) - 8,
            99_999_999,
            100_000_001,
            1 << 40,
            (1 << 63) - 1,
            (1 << 64) - 8,
            draw.randrange(1 << 64),
        )
    )
    return rewritten(path, said.to_bytes(8, "little") + data[8:])


def header_values(draw: random.Random, path: Path) -> Path:
    """JSON with a value that makes no sense."""
    tree, data = _parts(path)
    return _joined(path, spoil_json(draw, tree), data)


def shapes(draw: random.Random, path: Path) -> Path:
    """A shape that its bytes do, or do not, allow."""
    tree, data = _parts(path)
    entry = tree[draw.choice(_tensors(tree))]
    shape = entry["shape"]
    entry["shape"] = draw.choice(
        (
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [shape[0] + 1, *shape[1:]],
            [*shape[:-1], shape[-1] - 1],
            [],
            [0],
            [-n for n in shape],
            [functools.reduce(int.__mul__, shape)],
            [1 << 32, 1 << 32],
            shape[:-1],
        )
    )
    return _joined(path, tree, data)


def dtypes(draw: random.Random, path: Path) -> Path:
    """Another type, of the same width or not."""
    tree, data = _parts(path)
    entry = tree[draw.choice(_tensors(tree))]
    types = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "F32 ", "f32", ""]
    entry["dtype"] = draw.choice([name for name in types if name != entry["dtype"]])
    return _joined(path, tree, data)


def offsets(draw: random.Random, path: Path) -> Path:
    """Tensors that overlap, leave holes, lie beyond the end, or end before they begin."""
    tree, data = _parts(path)
    names = _tensors(tree)
    entry, other = tree[draw.choice(names)], tree[draw.choice(names)]
    start, stop = entry["data_offsets"]
    step = draw.choice((1, 2, 4, 8, 100, 1 << 20, 1 << 62))
    entry["data_offsets"] = draw.choice(
        (
            [start + step, stop + step],
            [start - step, stop - step],
            [start, stop + step],
            [stop, start],
            [start, start],
            list(other["data_offsets"]),
            [start, draw.choice(HOSTILE_VALUES)],
            [start],
        )
    )
    return _joined(path, tree, data)


def swapped(draw: random.Random, path: Path) -> Path:
    """Two tensors of one shape under each other's names."""
    tree, data = _parts(path)
    pairs = [(a, b) for a in _tensors(tree) for b in _tensors(tree) if a < b and tree[a]["shape"] == tree[b]["shape"]]
    if pairs:
        a, b = draw.choice(pairs)
        tree[a], tree[b] = tree[b], tree[a]
    return _joined(path, tree, data)


def renamed(draw: random.Random, path: Path) -> Path:
    """A name that no model has, or the model has elsewhere."""
    tree, data = _parts(path)
    name = draw.choice(_tensors(tree))
    new = draw.choice(
        (
            name + "x",
            name[:-1],
            "",
            name.replace("0", "7"),
            name.upper(),
            name.replace(".", "/"),
            "__metadata__x",
            "../x",
            "\x1b[2J" + name,
            "a\nb",
        )
    )
    return _joined(path, {(new if each == name else each): entry for each, entry in tree.items()}, data)


def dropped(draw: random.Random, path: Path) -> Path:
    """A tensor less, in a file that is sound."""
    tree, data = _parts(path)
    return _joined(path, *_without(tree, data, draw.choice(_tensors(tree))))


def added(draw: random.Random, path: Path) -> Path:
    """A tensor too many, in a file that is sound: a bias, a layer, a buffer, one that another shard has."""
    tree, data = _parts(path)
    own = draw.choice(_tensors(tree))
    name = draw.choice(
        (
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.9.input_layernorm.weight",
            "lora.weight",
            own + ".scale",
            "exits.9.norm.weight",
        )
    )
    tree[name] = {
        **tree[own],
        "data_offsets": [len(data), len(data) + tree[own]["data_offsets"][1] - tree[own]["data_offsets"][0]],
    }
    return _joined(path, tree, data + bytes(tree[name]["data_offsets"][1] - len(data)))


def doubled(draw: random.Random, folder: Path) -> Path:
    """A tensor twice: in two shards, or in one header."""
    paths = weights(folder)
    path = draw.choice(paths)
    tree, data = _parts(path)
    others = [other for other in paths if other != path]
    if others and draw.random() < 0.5:
        theirs, their_data = _parts(draw.choice(others))
        name = draw.choice(_tensors(theirs))
        start, stop = theirs[name]["data_offsets"]
        tree[name] = {**theirs[name], "data_offsets": [len(data), len(data) + stop - start]}
        return _joined(path, tree, data + their_data[start:stop])
    name = draw.choice(_tensors(tree))
    text = json.dumps(tree)
    return _joined(path, f"{{{json.dumps(name)}: {json.dumps(tree[name])}, {text[1:]}".encode(), data)


def _without(tree: Tree, data: bytes, name: str) -> tuple[Tree, bytes]:
    start, stop = tree[name]["data_offsets"]
    kept = {
        each: entry
        if each == "__metadata__" or entry["data_offsets"][0] < start
        else {**entry, "data_offsets": [n - (stop - start) for n in entry["data_offsets"]]}
        for each, entry in tree.items()
        if each != name
    }
    return kept, data[:start] + data[stop:]


def index_values(draw: random.Random, folder: Path) -> Path:
    """An index whose JSON makes no sense."""
    path = index_of(folder)
    assert path is not None
    tree = json.loads(path.read_text())
    return rewritten(path, spoil_json(draw, tree))


def index_paths(draw: random.Random, folder: Path) -> Path:
    """An index that leads out of the folder, to a wrong shard, or nowhere."""
    path = index_of(folder)
    assert path is not None
    tree = json.loads(path.read_text())
    names = sorted(tree["weight_map"])
    target = draw.choice(weights(folder)).name
    tree["weight_map"][draw.choice(names)] = draw.choice(
        (
            f"../{folder.name}/{target}",
            f"./{target}",
            str(folder / target),
            f"../{target}",
            "/etc/passwd",
            "",
            ".",
            "..",
            target + "\x00",
            "x" * 300,
            "missing.safetensors",
            "config.json",
            target,
        )
    )
    return rewritten(path, json.dumps(tree).encode())


def index_bits(draw: random.Random, folder: Path) -> Path:
    """Flipped bits in the index."""
    path = index_of(folder)
    assert path is not None
    return flip_bits(draw, path)


_SHARD = {
    "header: bits flipped": header_bits,
    "header: bytes lost": header_noise,
    "header: length lies": header_length,
    "header: senseless values": header_values,
    "header: shapes lie": shapes,
    "header: types lie": dtypes,
    "header: offsets lie": offsets,
    "weights: bits flipped": data_bits,
    "weights: bytes lost": data_noise,
    "truncated": truncate,
    "extended": extend,
    "missing": remove,
    "link, pipe or folder": replace_by_something_else,
    "tensors: names swapped": swapped,
    "tensors: renamed": renamed,
    "tensors: one missing": dropped,
    "tensors: one too many": added,
}

SHARD_MUTATIONS = {
    **{kind: functools.partial(_on_a_shard, damage) for kind, damage in _SHARD.items()},
    "tensors: one twice": doubled,
}
"""On the weights of a folder, one file or many."""
INDEX_MUTATIONS = {
    "index: senseless values": index_values,
    "index: leads elsewhere": index_paths,
    "index: bits flipped": index_bits,
}
UNKNOWABLE = {"weights: bits flipped", "weights: bytes lost", "tensors: names swapped", "header: types lie"}
"""Values that nothing else in a folder without checksums speaks of; of types, those of one width."""
