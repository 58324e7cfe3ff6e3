"""Mutated safetensors: a model's folder as strangers give it, one with a manifest, and an exit-heads artifact, sealed
and sealed anew.
"""

import functools
import json
import random
from pathlib import Path

import torch
from damage import flip_bits, overwrite_bytes, remove, replace_by_something_else, rewritten, spoil_json, truncate
from outcomes import Content, Mutation, Tally, torture
from random_models import random_llama
from safetensors_damage import INDEX_MUTATIONS, SHARD_MUTATIONS, UNKNOWABLE

from ee_tuning import cli
from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.artifact.exit_heads import ExitHeadsReader, save_exit_heads
from ee_tuning.checkpoint.fingerprint import config_of_shape, fingerprint
from ee_tuning.checkpoint.formats import check_model, open_model
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.config import ModelSection, ParallelSection, load_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.storage.manifest import write_manifest

_SHARES = {
    "model in one file": 10,
    "model in shards": 9,
    "model with a manifest": 4,
    "artifact in one file": 3,
    "artifact in shards": 2,
    "artifact, its manifest forged": 2,
}
"""Of 30."""


def stress_safetensors(count: int, seed: int, scratch: Path) -> Tally:
    """Reads `count` mutated folders."""
    tally = Tally()
    single, sharded, exported = (scratch / name for name in ("single", "sharded", "exported"))
    model = random_llama(single, num_hidden_layers=2, dtype=torch.bfloat16)
    model.bfloat16().save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="30KB")
    assert cli.main(["export", "--format", "hf", "--model", str(sharded), "--output", str(exported)]) == 0
    artifact, artifact_shards = _artifacts(single, scratch)
    sources = {
        "model in one file": (single, read_model),
        "model in shards": (sharded, read_model),
        "model with a manifest": (exported, read_model),
        "artifact in one file": (artifact, read_artifact),
        "artifact in shards": (artifact_shards, read_artifact),
        "artifact, its manifest forged": (artifact_shards, read_artifact),
    }
    for target, (source, read) in sources.items():
        is_forged = target.endswith("forged")
        has_manifest = (source / "manifest.json").exists() and not is_forged
        mutations: dict[str, Mutation] = {**SHARD_MUTATIONS}
        if source in (sharded, exported, artifact_shards):
            mutations.update(INDEX_MUTATIONS)
        if has_manifest:
            mutations |= {"manifest": functools.partial(_spoil, "manifest.json")}
        if read is read_artifact:
            mutations |= {"exit_config.json": functools.partial(_spoil, "exit_config.json")}
        unknowable = set() if has_manifest else UNKNOWABLE | {"exit_config.json"}
        torture(
            target,
            source,
            read,
            mutations,
            unknowable,
            _share(target, count),
            seed,
            scratch,
            tally,
            _forge if is_forged else None,
        )
    return tally


def read_model(folder: Path) -> Content:
    """A backbone, all of it, as tuning would read it."""
    model = open_model(ModelSection(path=str(folder)))
    with model.source as source:
        check_model(source, model.config, None, verifies=True)
        tensors = {name: source.rows(name, 0, shape[0]) for name, shape in backbone_tensor_shapes(model.config).items()}
        return Content(tensors, fingerprint(source, model.config))


def read_artifact(folder: Path) -> Content:
    """Exit heads, all of them, and what the artifact says of itself."""
    with ExitHeadsReader(folder) as reader:
        reader.check_complete(config_of_shape(reader.config.model_shape, folder / "exit_config.json"))
        return Content({name: reader.full(name) for name in reader.names()}, reader.config)


def _artifacts(model: Path, scratch: Path) -> tuple[Path, Path]:
    """The same exits in one file and in shards."""
    single, sharded = scratch / "artifact", scratch / "artifact_shards"
    config = load_config(None, {"model.path": str(model), "exits.exit_layers": "1,2", "exits.init": "random"})
    write_initial_exits(config, single, init_parallel(ParallelSection()))
    with ExitHeadsReader(single) as reader:
        shape = config_of_shape(reader.config.model_shape, single)
        save_exit_heads(
            sharded, reader.config, shape, ((name, reader.full(name)) for name in reader.names()), shard_bytes=30_000
        )
    return single, sharded


def _forge(folder: Path) -> None:
    """A manifest of the damaged files, by a hand that means it. (What is no file has no bytes to be listed.)"""
    if all(path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        write_manifest(folder)


def _share(target: str, count: int) -> int:
    return count * _SHARES[target] // sum(_SHARES.values())


def _spoil(name: str, draw: random.Random, folder: Path) -> Path:
    path = folder / name

    def values(draw: random.Random, path: Path) -> Path:
        return rewritten(path, spoil_json(draw, json.loads(path.read_text())))

    return draw.choice((values, values, flip_bits, overwrite_bytes, truncate, remove, replace_by_something_else))(
        draw, path
    )
