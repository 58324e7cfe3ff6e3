"""Megatron's legacy checkpoints: one folder `mp_rank_XX[_YYY]` per tensor-parallel rank and pipeline stage, with one
pickle each.

Keys have one of two layouts: Megatron-core's, or the older `language_model.encoder.layers.…`, which is renamed. Stages
and virtual pipeline chunks are concatenated, and tensor-parallel shards are merged while they are read. EE-LLM's exits
are kept apart; see ee_llm.py.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.checkpoint.megatron_source import MegatronSource, is_harmless, norm_alias
from ee_tuning.checkpoint.names import backbone_parameter_names
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.links import check_links
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.torch_file import Archive, StoredTensor, saved_arguments

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"(decoder\.layers|exit_output_layer)\.(\d+)\.(.+)")
_OF_EXITS = re.compile(r"exit_output_layer\.|decoder\.layers\.\d+\.(exit_norm|exit_block|mlp\.branch)\.")
_RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^language_model\.(embedding|(exit_)?output_layer)\.", r"\1."),
        (r"^language_model\.(encoder|transformer)\.", "decoder."),
        (r"^word_embeddings_for_head\.", "output_layer."),
        (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
        (r"\.input_norm\.", ".input_layernorm."),
        (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
        (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
        (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
        (r"\.mlp\.trunk\.", ".mlp."),
        (r"\.dense_h_to_4h\.", ".linear_fc1."),
        (r"\.dense_4h_to_h\.", ".linear_fc2."),
    )
)


class LegacyCheckpoint:
    """The opened files of all ranks.

    Raises InputError where one is missing or damaged or, unless `is_trusted`, its pickle names anything outside of the
    allow-list (Archive).
    """

    def __init__(self, folder: Path, *, is_trusted: bool = False):
        self.folder = folder
        files = _find(folder)
        self.num_ranks = 1 + max(rank for rank, _ in files)
        self.num_stages = 1 + max(stage for _, stage in files)
        self.arguments: dict[str, Any] | None = None
        """The arguments that Megatron saved with the model, if any."""
        self.tables: list[dict[str, StoredTensor]] = []
        """Tensors of each tensor-parallel rank, by Megatron-core's names with global layer indices."""
        for rank in range(self.num_ranks):
            parts = [self._open(files, rank, stage, is_trusted) for stage in range(self.num_stages)]
            if len({len(each) for each in parts}) > 1:
                raise InputError(
                    f"{folder}: every stage of a virtual pipeline must hold as many parts of the model, got "
                    f"{', '.join(str(len(each)) for each in parts)}; fetch the whole folder"
                )
            table: dict[str, StoredTensor] = {}
            counts = {"decoder.layers": 0, "exit_output_layer": 0}
            # The model runs the first chunk of every stage before the second chunk of any.
            for own in (each for turn in zip(*parts, strict=True) for each in turn):
                for key, tensor in own.items():
                    table.setdefault(_shifted(key, counts), tensor)
                for kind, count in counts.items():
                    counts[kind] = count + _depth(own, kind)
            self.tables.append(table)

    def _open(
        self, files: dict[tuple[int, int], Path], rank: int, stage: int, is_trusted: bool
    ) -> list[dict[str, StoredTensor]]:
        """Returns the tensors of one file under Megatron-core's names.

        Layers are numbered within the stage, or within each chunk of a virtual pipeline (`model0`, `model1`, …).
        """
        path = files.get((rank, stage))
        if path is None:
            raise InputError(
                f"{self.folder} must hold every tensor-parallel rank of every stage, and rank {rank} of stage {stage} is "
                "missing; fetch the whole folder"
            )
        content = Archive(path, MappedFile(path), is_trusted=is_trusted).content
        names = ["model"]
        if isinstance(content, dict) and "model0" in content:
            names = [
                f"model{i}" for i in range(sum(re.fullmatch(r"model\d+", str(key)) is not None for key in content))
            ]
        if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in names):
            raise InputError(
                f"{path} must hold a Megatron model under `{'`, `'.join(names)}`, and does not; give a Megatron checkpoint"
            )
        self.arguments = self.arguments or saved_arguments(content)
        if any("language_model" in content[name] for name in names):
            self._check_version(content, path)
        return [{_renamed(key): tensor for key, tensor in _flattened(content[name], "")} for name in names]

    def _check_version(self, content: dict[str, Any], path: Path) -> None:
        version = content.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < 2:
            raise InputError(
                f"{path}: checkpoint_version must be at least 2.0, got {version}: before it, queries, keys and values stood "
                "in another order; load and save the model with a later Megatron-LM"
            )


class LegacyReader(MegatronSource):
    """A backbone in a legacy checkpoint; see TensorSource."""

    def __init__(self, checkpoint: LegacyCheckpoint, config: ModelConfig):
        super().__init__(checkpoint.folder, config)
        self.checkpoint, self.num_ranks = checkpoint, checkpoint.num_ranks

    def stored_shape(self, parameter: str, rank: int) -> TensorShape | None:
        """Returns the shape of a rank's shard."""
        tensor = self._tensor(parameter, rank)
        return tensor.shape if tensor else None

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Returns the dtype of an existing parameter."""
        tensor = self._tensor(parameter, 0)
        assert tensor is not None
        return tensor.dtype

    def read(self, parameter: str, rank: int, rows: slice, columns: slice | None) -> Tensor:
        """Reads a rectangle. A single row is read without its checksum; otherwise a fingerprint would read the whole
        checkpoint.
        """
        tensor = self._tensor(parameter, rank)
        assert tensor is not None
        if rows.stop - rows.start > 1 and not self.manifest_verified:
            tensor.check()
        part = (rows, *((columns,) if columns else ()))
        out = torch.empty_like(tensor.mapped()[part], memory_format=torch.contiguous_format)
        tensor.copy_part(tensor.shape, part, out)
        return out

    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""
        return {
            str(tensor.archive.path.relative_to(self.folder))
            for table in self.checkpoint.tables
            for tensor in table.values()
        }

    def path(self, parameter: str, rank: int) -> Path:
        """Returns the file of a shard, or the folder where there is none."""
        tensor = self._tensor(parameter, rank)
        return tensor.archive.path if tensor else self.folder

    def unexpected_keys(self) -> Iterator[tuple[str, Path]]:
        """Yields the model's tensors that `config` does not explain."""
        known = {
            name for parameter in backbone_parameter_names(self.config) for name in (parameter, norm_alias(parameter))
        }
        for table in self.checkpoint.tables:
            for key, tensor in table.items():
                if (
                    key not in known
                    and not _OF_EXITS.match(key)
                    and not is_harmless(key, ties_embeddings=self.config.ties_embeddings)
                ):
                    yield key, tensor.archive.path

    def _tensor(self, parameter: str, rank: int) -> StoredTensor | None:
        table = self.checkpoint.tables[rank]
        return table.get(parameter) or table.get(norm_alias(parameter))


def is_legacy(folder: Path) -> bool:
    """Whether the folder contains `mp_rank_XX` folders."""
    return next(folder.glob("mp_rank_*"), None) is not None


def _find(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns the files by (tensor-parallel rank, stage)."""
    files = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match is None:
            raise InputError(
                f"{path} is of no tensor-parallel rank and stage (mp_rank_XX or mp_rank_XX_YYY); experts are not supported"
            )
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(f"{path} must hold {' or '.join(_FILES)}, and holds neither; fetch the whole folder")
        check_links(folder, file)
        files[int(match[1]), int(match[2] or 0)] = file
    return files


def _flattened(tree: dict[Any, Any], prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        elif isinstance(value, StoredTensor):
            yield f"{prefix}{key}", value


def _renamed(key: str) -> str:
    for old, new in _RENAMED:
        key = old.sub(new, key)
    return key


def _shifted(key: str, counts: dict[str, int]) -> str:
    """Returns the name with the global number of a layer (or an exit's output matrix); earlier stages hold `counts`."""
    match = _LAYER.match(key)
    return f"{match[1]}.{int(match[2]) + counts[match[1]]}.{match[3]}" if match else key


def _depth(keys: Iterable[str], kind: str) -> int:
    return 1 + max((int(match[2]) for match in map(_LAYER.match, keys) if match and match[1] == kind), default=-1)
