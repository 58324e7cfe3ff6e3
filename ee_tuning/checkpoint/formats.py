"""Opens a model in any format: detects the format, and gives its backbone as a source of tensors and its shape.

Formats are Hugging Face folders, GGUF files, Megatron-core's distributed checkpoints, and legacy Megatron's
`mp_rank_XX` folders. A Megatron run's folder stands for its latest iteration, and a name may refer to the Hugging Face
hub.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

from ee_tuning.checkpoint.adapted_source import AdaptedSource
from ee_tuning.checkpoint.adapter import refuse_adapter
from ee_tuning.checkpoint.gguf_file import SUFFIX, GgufReader, is_gguf
from ee_tuning.checkpoint.hub import fetch_model, hub_name
from ee_tuning.checkpoint.huggingface import HuggingFaceReader
from ee_tuning.checkpoint.legacy import LegacyCheckpoint, LegacyReader, is_legacy
from ee_tuning.checkpoint.megatron import DistributedCheckpoint, MegatronReader
from ee_tuning.checkpoint.megatron_source import MegatronSource
from ee_tuning.checkpoint.names import embedding_name, output_name
from ee_tuning.checkpoint.tied_output import holds_another_output, untied
from ee_tuning.config import ModelSection
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.model_config.megatron_args import read_megatron_config
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.links import dangling_link
from ee_tuning.storage.manifest import MANIFEST, ManifestCheck, holds_manifest, read_manifest
from ee_tuning.storage.metadata_pickle import METADATA
from ee_tuning.storage.missing_weights import refuse_file
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.tensor_source import TensorSource
from ee_tuning.storage.torch_file import Archive, saved_arguments

ModelFormat = Literal["huggingface", "megatron", "legacy_megatron", "gguf"]
FORMATS: dict[ModelFormat, str] = {
    "huggingface": "Hugging Face safetensors",
    "megatron": "Megatron-core distributed checkpoint",
    "legacy_megatron": "legacy Megatron checkpoint (mp_rank folders)",
    "gguf": "GGUF file",
}
"""Names of the formats in messages."""

_LATEST, COMMON = "latest_checkpointed_iteration.txt", "common.pt"
_REMEDY = "fetch or export the model again, or, if you changed it yourself, give --no-verify"


class BackboneSource(TensorSource, Protocol):
    """A model's tensors under Hugging Face's names, in any format. A context manager."""

    folder: Path
    manifest_verified: bool
    """Whether a manifest is verified, so that the format's own checksums need not be."""

    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or would be ignored."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class OpenModel(NamedTuple):
    """An opened backbone."""

    source: BackboneSource
    config: ModelConfig
    kind: ModelFormat


def open_model(model: ModelSection) -> OpenModel:
    """Opens the backbone that model.path names, in any format, with the trained weights of model.adapter over it.

    No weights are read yet, except an output matrix beside an embedding that it is said to be tied to. Raises
    InputError where the format is unknown, files are missing, the model is not supported, or it is not trusted.
    """
    opened = _open_base(model)
    if model.adapter is None:
        return opened
    return OpenModel(AdaptedSource(opened.source, opened.config, Path(model.adapter)), opened.config, opened.kind)


def _open_base(model: ModelSection) -> OpenModel:
    folder = model_folder(model.path)
    shape = Path(model.config) if model.config else None
    if is_gguf(folder):
        if shape is not None:
            raise InputError(
                f"model.config is the shape of a Megatron checkpoint, and {folder} has its own in its fields; leave "
                "--config out"
            )
        gguf = GgufReader(folder)
        return OpenModel(gguf, gguf.config, "gguf")
    if (folder / METADATA).is_file():
        return _distributed(folder, shape or describing_file(folder, None), is_trusted=model.trust_pickle)
    if next(folder.glob("*.distcp"), None):
        raise InputError(
            f"{folder / METADATA} is missing, which describes the *.distcp files beside it; fetch the whole checkpoint again"
        )
    if is_legacy(folder):
        checkpoint = LegacyCheckpoint(folder, is_trusted=model.trust_pickle)
        config = read_megatron_config(checkpoint.arguments, shape, folder)
        if config.num_experts:
            raise InputError(
                f"{folder} is a legacy Megatron checkpoint of a model with experts, which is not supported; save it as a "
                "distributed checkpoint (--ckpt-format torch_dist)"
            )
        return _megatron(lambda config: LegacyReader(checkpoint, config), config, "legacy_megatron")
    if shape is not None:
        raise InputError(
            f"model.config is the shape of a Megatron checkpoint, and {folder} is none; a Hugging Face folder has its own "
            "config.json; leave --config out"
        )
    return _huggingface(folder)


def read_shape(model: ModelSection, *, needs_weights: bool = True) -> ModelConfig:
    """Returns the shape of the model. Without `needs_weights`, a folder may hold its config.json alone.

    Raises like `open_model`.
    """
    if not needs_weights and not model.config:
        folder = model_folder(model.path, needs_weights=False)
        if not has_weights(folder):
            return read_model_config(folder)
    opened = open_model(model)
    with opened.source:
        return opened.config


def _huggingface(folder: Path) -> OpenModel:
    refuse_adapter(folder)
    config = read_model_config(folder)
    reader = HuggingFaceReader(folder)
    if config.ties_embeddings:
        reader.take_output_for_embedding(config)
        if all(map(reader.holds, (embedding_name(config), output_name(config)))) and holds_another_output(
            reader, config
        ):
            config = untied(config)
    return OpenModel(reader, config, "huggingface")


def _distributed(folder: Path, shape: Path | None, *, is_trusted: bool) -> OpenModel:
    """Opens a distributed checkpoint. Its arguments are in common.pt or among its tensors."""
    common = folder / COMMON
    if common.is_file():
        saved = saved_arguments(Archive(common, MappedFile(common), is_trusted=is_trusted).content)
        checkpoint = DistributedCheckpoint(folder)
    else:
        checkpoint = DistributedCheckpoint(folder)
        saved = checkpoint.arguments(is_trusted=is_trusted)
        if saved is None and shape is None:
            raise InputError(
                f"{common} is missing, in which Megatron-core before 0.19 keeps a model's arguments, and the tensors hold none; "
                "fetch the whole checkpoint again, or give the model's shape: --config FILE, a Hugging Face config.json, or "
                "YAML with Megatron's names (num_layers, hidden_size, …)"
            )
    config = read_megatron_config(saved, shape, common if common.is_file() else folder)
    return _megatron(lambda config: MegatronReader(checkpoint, config), config, "megatron")


def _megatron(reader_of: Callable[[ModelConfig], MegatronSource], config: ModelConfig, kind: ModelFormat) -> OpenModel:
    reader = reader_of(config)
    if config.ties_embeddings and reader.has_output():
        own = untied(config)
        both = reader_of(own)
        if holds_another_output(both, own):
            return OpenModel(both, own, kind)
    return OpenModel(reader, config, kind)


def check_model(source: BackboneSource, config: ModelConfig, topology: Topology | None, *, verifies: bool) -> None:
    """Raises InputError, on all ranks, where the weights do not match `config` or, with `verifies`, a file differs from
    its manifest.

    All ranks share the reading.
    """
    with background_check(source, config, topology, verifies=verifies) as finish:
        finish()


@contextmanager
def background_check(
    source: BackboneSource, config: ModelConfig, topology: Topology | None, *, verifies: bool
) -> Iterator[Callable[[], None]]:
    """Runs `check_model` in the background of the block. Yields a function that waits for it, and raises."""
    on_first_rank(topology, lambda: source.check_complete(config))
    if not verifies or not on_first_rank(topology, lambda: holds_manifest(source.folder)):
        yield lambda: None
        return
    on_first_rank(topology, lambda: _check_listed(source))
    source.manifest_verified = True
    with ManifestCheck(source.folder, _REMEDY, topology) as check:
        yield check.finish


def _check_listed(source: BackboneSource) -> None:
    """Raises InputError where weights lie in a file that the manifest does not list."""
    for file in source.weight_files() - set(read_manifest(source.folder, _REMEDY)):
        raise InputError(
            f"{source.folder / MANIFEST} does not list {file}, which holds weights of the model; {_REMEDY}"
        )


def has_weights(folder: Path) -> bool:
    """Whether the folder of a model (`model_folder`) holds more than its config.json."""
    return (
        is_gguf(folder) or (folder / METADATA).is_file() or is_legacy(folder) or any(folder.glob("model*.safetensors*"))
    )


def is_huggingface(path: str) -> bool:
    """Whether `path` is a Hugging Face folder or a name on the hub. It never raises, and reads no file."""
    folder = Path(path)
    if hub_name(path) is not None:
        return True
    return (folder / "config.json").is_file() and not (folder / METADATA).is_file() and not is_legacy(folder)


def describing_file(folder: Path, shape: str | None) -> Path | None:
    """Returns the Hugging Face config.json of the model in `folder`, or None.

    It is `shape` (model.config) if that is one, or the folder's own, which this project's Megatron exports have, too.
    """
    path = Path(shape) if shape else folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return None
    return path if isinstance(tree, dict) and "model_type" in tree else None


def model_folder(path: str, *, needs_weights: bool = True) -> Path:
    """Returns the folder of the model: `path`, the latest iteration in it, or the download of the hub's
    `org/name@revision`.

    A GGUF file is returned as it is.
    """
    if not path:
        raise InputError("model.path must name a model's folder, got nothing; give --model FOLDER")
    folder = Path(path)
    if is_gguf(folder):
        return folder
    if not folder.is_dir():
        refuse_file(folder)
        if name := hub_name(path):
            folder = fetch_model(name, needs_weights=needs_weights)
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; give the folder of a model (Hugging Face's, or a Megatron checkpoint), or a name "
            "on the Hugging Face hub"
        )
    if (folder / "config.json").is_file() or (folder / METADATA).is_file() or is_legacy(folder):
        return folder
    latest = folder / _LATEST
    if latest.is_file():
        word = latest.read_text(errors="replace", encoding="utf-8").strip()
        iteration = folder / ("release" if word == "release" else f"iter_{int(word):07d}" if word.isdecimal() else "?")
        if not iteration.is_dir():
            raise InputError(
                f"{latest} says {word[:40]!r}, and there is no such iteration; give the folder of one that is there"
            )
        return iteration
    iterations = sorted(entry.name for entry in folder.glob("iter_*"))
    if iterations:
        raise InputError(
            f"{folder} holds iterations ({', '.join(iterations[-3:])}) and no {_LATEST}; give the folder of one of them"
        )
    refuse_adapter(folder)
    if reason := dangling_link(folder / "config.json") or dangling_link(folder / METADATA):
        raise InputError(reason)
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        raise InputError(f"{folder} holds GGUF files, which are given by name: --model {files[0]}")
    raise InputError(
        f"{folder} is neither a Hugging Face folder (config.json and safetensors) nor a Megatron checkpoint ({METADATA}, "
        f"mp_rank_00 or {_LATEST}); give the folder of a model"
    )
