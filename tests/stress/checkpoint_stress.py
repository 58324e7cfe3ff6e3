"""Mutated Megatron checkpoints: a stranger's distributed one, ours with its manifest, a legacy one; and pickles that
mean harm.
"""

import functools
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damage import (
    HOSTILE_VALUES,
    extend,
    flip_bits,
    overwrite_bytes,
    remove,
    replace_by_something_else,
    rewritten,
    truncate,
)
from megatron_files import save_legacy, save_stock_model
from outcomes import Mutation, Tally, torture
from random_models import random_llama
from safetensors_stress import read_model

from ee_tuning import cli
from ee_tuning.model_config.config import read_model_config

_BYTES: dict[str, Callable[[random.Random, Path], Path]] = {
    "bits flipped": flip_bits,
    "bytes lost": overwrite_bytes,
    "truncated": truncate,
    "extended": extend,
    "missing": remove,
    "link, pipe or folder": replace_by_something_else,
}
_HOSTILE = "hostile"  # the file that a pickle which ran would leave


class Harm:
    """Pickled, it calls what it is given."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def stress_checkpoints(count: int, seed: int, scratch: Path) -> Tally:
    """Reads `count` mutated checkpoints."""
    tally = Tally()
    model, stock, ours, legacy = (scratch / name for name in ("model", "stock", "ours", "legacy"))
    reference = random_llama(model, num_hidden_layers=2)
    save_stock_model(str(model), str(stock), 1, 1, None, True)
    assert cli.main(["export", "--format", "megatron", "--model", str(model), "--output", str(ours)]) == 0
    save_legacy(reference, read_model_config(model), legacy, 2, (1, 1), is_old=True)
    metadata: dict[str, Mutation] = {
        ".metadata: description lies": spoil_metadata,
        ".metadata: hostile pickle": functools.partial(hostile_pickle, ".metadata"),
    }
    targets = {
        "distributed checkpoint": (
            stock,
            5,
            {
                **_on(".metadata"),
                **_on("*.distcp"),
                **_on("common.pt"),
                **metadata,
                "common.pt: hostile pickle": functools.partial(hostile_archive, "common.pt"),
                "*.distcp: hostile pickle": functools.partial(hostile_archive, "*.distcp"),
            },
        ),
        "distributed checkpoint with a manifest": (
            ours,
            3,
            {**_on(".metadata"), **_on("*.distcp"), **_on("common.pt"), **metadata},
        ),
        "legacy checkpoint": (
            legacy,
            2,
            {**_on("mp_rank_*/*.pt"), "hostile pickle": functools.partial(hostile_archive, "mp_rank_*/*.pt")},
        ),
    }
    here = Path.cwd()
    os.chdir(scratch)
    try:
        for target, (source, share, mutations) in targets.items():
            torture(target, source, read_model, mutations, set(), count * share // 10, seed, scratch, tally)
    finally:
        os.chdir(here)
    if any(scratch.rglob(_HOSTILE)):
        tally.failures.append("a pickle ran")
    return tally


def _on(pattern: str) -> dict[str, Mutation]:
    def damage(kind: str, draw: random.Random, folder: Path) -> Path:
        return _BYTES[kind](draw, draw.choice(sorted(folder.glob(pattern))))

    return {f"{pattern}: {kind}": functools.partial(damage, kind) for kind in _BYTES}


def spoil_metadata(draw: random.Random, folder: Path) -> Path:
    """A description, sound as a pickle, in which something has become something else."""
    path = folder / ".metadata"
    tree = pickle.loads(path.read_bytes())
    keys = sorted(key for key, entry in tree.state_dict_metadata.items() if hasattr(entry, "chunks"))
    entry = tree.state_dict_metadata[draw.choice(keys)]
    chunk, index = draw.choice(entry.chunks), draw.choice([i for i in tree.storage_data if i.offset is not None])
    info, other = tree.storage_data[index], draw.choice(list(tree.storage_data.values()))
    wrong = draw.choice((*HOSTILE_VALUES, torch.Size([3]), torch.Size([1 << 60, 5]), other.offset, other.length))
    kind = draw.choice(
        (
            "size",
            "chunk sizes",
            "chunk offsets",
            "no chunks",
            "chunk twice",
            "dtype",
            "properties",
            "file",
            "offset",
            "length",
            "place of another",
            "key missing",
            "place missing",
            "tables",
            "key renamed",
        )
    )
    if kind in ("size", "properties"):
        setattr(entry, kind, wrong)
    elif kind in ("chunk sizes", "chunk offsets"):
        old = getattr(chunk, kind.split()[1])
        setattr(
            chunk,
            kind.split()[1],
            draw.choice((wrong, torch.Size([n + 1 for n in old]), torch.Size([-n for n in old]), old[:-1])),
        )
    elif kind == "no chunks":
        entry.chunks = draw.choice(([], wrong))
    elif kind == "chunk twice":
        entry.chunks.append(chunk)
    elif kind == "dtype":
        object.__setattr__(entry.properties, "dtype", draw.choice((torch.float16, torch.int8, torch.bfloat16, wrong)))
    elif kind == "file":
        info.relative_path = draw.choice(
            (wrong, other.relative_path, "../outside", "missing.distcp", ".metadata", "common.pt")
        )
    elif kind in ("offset", "length"):
        old = getattr(info, kind)
        setattr(info, kind, draw.choice((wrong, old + 1, old - 1, old + 64, -old, 1 << 62)))
    elif kind == "place of another":
        tree.storage_data[index] = other
    elif kind == "key missing":
        del tree.state_dict_metadata[draw.choice(keys)]
    elif kind == "place missing":
        del tree.storage_data[index]
    elif kind == "tables":
        setattr(tree, draw.choice(("state_dict_metadata", "storage_data")), wrong)
    else:
        name = draw.choice(keys)
        tree.state_dict_metadata[draw.choice((name + "x", name.replace("0", "7"), draw.choice(keys)))] = (
            tree.state_dict_metadata.pop(name)
        )
    try:
        return rewritten(path, pickle.dumps(tree))
    except UnicodeEncodeError:
        return remove(draw, path)


def harms(draw: random.Random) -> bytes:
    """A pickle that would run a command, write a file, eat all memory, or nest without end."""
    function = draw.choice((os.system, eval, exec, os.mkdir, getattr, __import__, print, open))
    argument = {
        os.system: f"touch {_HOSTILE}",
        eval: f"open('{_HOSTILE}', 'w')",
        exec: f"open('{_HOSTILE}', 'w')",
        os.mkdir: _HOSTILE,
        open: _HOSTILE,
    }.get(function, "os")
    calling = pickle.dumps(
        Harm(function, *([argument, "w"] if function is open else [argument])), protocol=draw.choice((0, 2, 4))
    )
    dotted = (
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c"
        + bytes([6 + len(_HOSTILE)])
        + f"touch {_HOSTILE}".encode()
        + b"\x85R."
    )
    return draw.choice(
        (
            calling,
            calling,
            calling,
            dotted,
            pickle.dumps({"model": Harm(os.system, f"touch {_HOSTILE}")}),
            b"\x80\x02Nr"
            + struct.pack("<I", draw.choice((1 << 31, (1 << 32) - 1)))
            + b".",  # a memo with room for billions
            b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
            b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
            b"(" * 1_000_000 + b".",
            b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
            b"\x80\x02\x82\x01.",
            b"cbuiltins\nglobals\n)R.",
            b".",
            b"",
        )
    )


def hostile_pickle(name: str, draw: random.Random, folder: Path) -> Path:
    """A file that is nothing but such a pickle."""
    return rewritten(folder / name, harms(draw))


def hostile_archive(pattern: str, draw: random.Random, folder: Path) -> Path:
    """An archive as torch.save writes them, with such a pickle in it; of a distributed checkpoint, in the place of a
    tensor.
    """
    path = draw.choice(sorted(folder.glob(pattern)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", harms(draw))
        archive.writestr("archive/version", "3\n")
    if pattern == "*.distcp":
        described = pickle.loads((folder / ".metadata").read_bytes())
        for info in described.storage_data.values():
            if info.relative_path == path.name:
                info.offset, info.length = 0, path.stat().st_size
                break
        (folder / ".metadata").write_bytes(pickle.dumps(described))
    return path
