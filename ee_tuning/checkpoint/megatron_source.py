"""Presents Megatron's fused and sharded parameters as whole tensors under Hugging Face's names.

It inverts the key maps of `names.py`: it finds each slice of a Hugging Face tensor among the stored shards.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ee_tuning.checkpoint.names import backbone_parameter_names, backbone_shard, backbone_tensor_shapes
from ee_tuning.checkpoint.unread import refuse_meaningful, unread
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.safetensors_reader import DTYPES
from ee_tuning.storage.tensor_slice import TensorShape, TensorSlice
from ee_tuning.storage.tensor_source import TensorSource

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""A layer's norms: names in the local layer spec -> names in Transformer Engine's fused modules."""


@dataclass(frozen=True)
class StoredSlice:
    """A slice of a Hugging Face tensor: it is stored in rank `rank`'s `parameter`, from row `row` on if it is cut by
    rows.
    """

    piece: TensorSlice
    parameter: str
    rank: int
    row: int


class MegatronSource(TensorSource, ABC):
    """A backbone in a Megatron checkpoint; see TensorSource. A context manager."""

    num_ranks = 1
    """Number of tensor-parallel shards of the stored parameters."""
    manifest_verified = False
    """Whether a manifest is verified, so that the archives' own checksums need not be."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self.config = folder, config
        self._shapes = backbone_tensor_shapes(config)
        self._stretches: dict[str, list[StoredSlice]] | None = None

    @abstractmethod
    def stored_shape(self, parameter: str, rank: int) -> TensorShape | None:
        """Returns the shape of rank's shard, or None if it is absent."""

    @abstractmethod
    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Returns the dtype of an existing parameter."""

    @abstractmethod
    def read(self, parameter: str, rank: int, rows: slice, columns: slice | None) -> Tensor:
        """Reads a rectangle of rank's shard. `columns` is None for vectors and for all columns."""

    @abstractmethod
    def path(self, parameter: str, rank: int) -> Path:
        """Returns the file of the shard, for error messages."""

    def has_output(self) -> bool:
        """Whether an output matrix is stored, possibly as a copy of the embedding."""
        return self.stored_shape("output_layer.weight", 0) is not None

    @abstractmethod
    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""

    @abstractmethod
    def unexpected_keys(self) -> Iterator[tuple[str, Path]]:
        """Yields the model's tensors that `config` does not explain, and their files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing: files are mapped, not held open."""
        return None

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        self._parts(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype, one of float64, float32, float16 and bfloat16."""
        part = self._parts(name)[0]
        dtype = self.stored_dtype(part.parameter)
        if dtype not in DTYPES.values():
            raise InputError(
                f"{self.path(part.parameter, part.rank)}: {part.parameter} is stored as {dtype}, which is not supported; "
                "save the model in bfloat16, float16 or float32"
            )
        return dtype

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing, has another shape, or is not stored as a plain float."""
        self.dtype(name)
        if self.shape(name) != shape:
            raise InputError(
                f"{self.folder}: tensor {name} must have shape {list(shape)}, got {list(self.shape(name))}; config and "
                "weights are of different models"
            )

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or would be ignored."""
        refuse_meaningful(self.unexpected_keys())
        for name, shape in backbone_tensor_shapes(config).items():
            self.check_shape(name, shape)
        for key, path in self.unexpected_keys():
            raise unread(key, path, config, "the shape (saved arguments, or --config)")

    def full(self, name: str) -> Tensor:
        """Returns the whole tensor, as stored."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], as stored."""
        shape = self.shape(name)
        return self._rectangle(name, slice(start, stop), slice(0, shape[1]) if len(shape) > 1 else None)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], as stored."""
        return self._rectangle(name, slice(0, self.shape(name)[0]), slice(start, stop))

    def _rectangle(self, name: str, rows: slice, columns: slice | None) -> Tensor:
        found, stretches = [], self._parts(name)
        for stretch in stretches:
            piece = stretch.piece
            wanted, across = (rows, columns) if piece.dim == 0 else (columns, rows)
            assert wanted is not None
            first, last = max(wanted.start, piece.start), min(wanted.stop, piece.stop)
            if first >= last:
                continue
            shift = (stretch.row if piece.cut_dim == 0 else 0) - piece.start
            along = slice(first + shift, last + shift)
            if piece.cut_dim == 0:
                part = self.read(stretch.parameter, stretch.rank, along, across)
            else:
                assert across is not None
                part = self.read(stretch.parameter, stretch.rank, across, along)
            found.append(part.t() if piece.is_transposed else part)
        if not found:
            return torch.empty(
                [part.stop - part.start for part in (rows, columns) if part is not None], dtype=self.dtype(name)
            )
        return torch.cat(found, dim=stretches[0].piece.dim) if len(found) > 1 else found[0].contiguous()

    def _parts(self, name: str) -> list[StoredSlice]:
        if self._stretches is None:
            self._stretches = self._plan()
        if name not in self._stretches:
            raise InputError(
                f"{self.folder} holds no tensor {name}, which the model must have; shape and weights do not belong together"
            )
        return self._stretches[name]

    def _plan(self) -> dict[str, list[StoredSlice]]:
        """Returns the stored slices of every Hugging Face tensor, in order. Checks all shapes."""
        plan: dict[str, list[StoredSlice]] = {}
        for parameter in backbone_parameter_names(self.config):
            if parameter == "output_layer.weight" and self.config.ties_embeddings:
                continue
            seen = set()
            for rank, pieces in enumerate(self._pieces(parameter)):
                row = 0
                for piece in pieces:
                    place = (piece.name, piece.dim, piece.start)
                    if place not in seen and piece.size:  # replicated on all ranks: the first rank's copy is read
                        plan.setdefault(piece.name, []).append(StoredSlice(piece, parameter, rank, row))
                        seen.add(place)
                    row += piece.size
        for stretches in plan.values():
            stretches.sort(key=lambda stretch: stretch.piece.start)
        return plan

    def _pieces(self, parameter: str) -> list[tuple[TensorSlice, ...]]:
        """Returns the slices of each rank's shard."""
        shapes = [self.stored_shape(parameter, rank) for rank in range(self.num_ranks)]
        known = []
        for rank, shape in enumerate(shapes):
            if shape is None:
                raise InputError(
                    f"{self.path(parameter, rank)} holds no parameter {parameter}, which the model must have; shape and "
                    "weights do not belong together"
                )
            known.append(shape)
        if parameter in VOCABULARY:
            return self._vocabulary(parameter, known)
        plans = [backbone_shard(parameter, self.config, self.num_ranks, rank) for rank in range(self.num_ranks)]
        for rank, (shape, shard) in enumerate(zip(known, plans, strict=True)):
            if shape != shard.shape:
                raise InputError(
                    f"{self.path(parameter, rank)}: {parameter} must have shape {list(shard.shape)}, got {list(shape)}; the "
                    "shape (saved arguments, or --config) and the weights are of different models"
                )
        return [shard.pieces for shard in plans]

    def _vocabulary(self, parameter: str, shapes: list[TensorShape]) -> list[tuple[TensorSlice, ...]]:
        """Returns the vocabulary's slices per rank. Padding differs from run to run, so the stored shapes decide who
        has which rows.
        """
        size, width = self.config.vocab_size, self.config.hidden_size
        name = next(iter(backbone_shard(parameter, self.config, 1, 0).pieces)).name
        if sum(shape[0] for shape in shapes) < size or any(shape[1:] != (width,) for shape in shapes):
            raise InputError(
                f"{self.path(parameter, 0)}: {parameter} must have at least {size} rows of {width}, got "
                f"{sum(shape[0] for shape in shapes)} of {list(shapes[0][1:])}; give the model's own vocab_size by --config"
            )
        pieces: list[tuple[TensorSlice, ...]] = []
        start = 0
        for shape in shapes:
            pieces.append((TensorSlice(name, (size, width), 0, min(start, size), min(start + shape[0], size)),))
            start += shape[0]
        return pieces


def norm_alias(parameter: str) -> str:
    """Returns the name of a layer's norm in Transformer Engine's fused modules; other parameters keep their names."""
    for local, fused in _FUSED_NORMS.items():
        parameter = parameter.replace(f".{local}", f".{fused}")
    return parameter


def is_harmless(key: str, *, ties_embeddings: bool) -> bool:
    """Whether a key without a parameter may be ignored: states of fused modules, buffers, a tied copy."""
    return "_extra_state" in key or key.endswith("inv_freq") or (ties_embeddings and key == "output_layer.weight")
