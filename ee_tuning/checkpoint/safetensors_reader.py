"""Tensors of a folder of safetensors, one file or shards with an index, read by slices and opened when first needed.

Nothing in the folder is trusted: what is broken, missing, doubled or points out of the folder is refused with the file's name.
"""
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ee_tuning.checkpoint.names import Piece, Shape, Shard
from ee_tuning.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types a model may be stored in."""


class TensorSource(Protocol):
    """Whole tensors that can be read by slices."""

    def shape(self, name: str) -> Shape:
        """Of the whole tensor."""
    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, …], as stored."""
    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start], as stored."""
    def check_shape(self, name: str, shape: Shape) -> None:
        """Raises InputError where the tensor is missing or has another shape."""


def read_shard(source: TensorSource, shard: Shard, dtype: torch.dtype) -> Tensor:
    """The shard's tensor, contiguous, as `dtype`. Raises InputError where a tensor is missing or has another shape than it should."""
    out = torch.empty(shard.shape, dtype=dtype)
    row = 0
    for piece in shard.pieces:
        source.check_shape(piece.name, piece.shape)
        if piece.cut_dim == 1:
            out.copy_(_read_piece(source, piece))
            return out
        if piece.size:
            out[row:row + piece.size].copy_(_read_piece(source, piece))
        row += piece.size
    out[row:].zero_()
    return out


def _read_piece(source: TensorSource, piece: Piece) -> Tensor:
    part = (source.columns if piece.dim == 1 else source.rows)(piece.name, piece.start, piece.stop)
    return part.t() if piece.is_transposed else part


class SafetensorsFolder:
    """`<stem>.safetensors`, or `<stem>.safetensors.index.json` and its shards, in `folder`. A context manager; tensors come on the CPU.

    Raises InputError, naming file and tensor, where something is missing, broken, doubled or outside the folder.
    """

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self._open: dict[str, Any] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give the folder that holds {single.name}")
        self.files: dict[str, str] = {}
        """Tensor -> its file."""
        if single.exists():
            self.files = dict.fromkeys(self._file(single.name).keys(), single.name)
        elif index.exists():
            self.files = _read_index(index)
        else:
            raise InputError(f"{folder} must hold {single.name} or {index.name}, and holds neither; "
                             "weights in other formats have to be saved as safetensors first")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def names(self) -> list[str]:
        """Every tensor there is, sorted."""
        return sorted(self.files)

    def stored_name(self, name: str) -> str:
        """What the files call the tensor `name`."""
        return name

    def shape(self, name: str) -> Shape:
        """Of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """As stored; one of float64, float32, float16 and bfloat16."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise InputError(f"{self._path(name)}: tensor {name} is stored as {stored}, which is not supported; "
                             f"convert the model to one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def full(self, name: str) -> Tensor:
        """The whole tensor, as stored."""
        return self._read(name, slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, …]: these rows, as stored; no other bytes are read."""
        return self._read(name, slice(start, stop))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]: these columns, as stored."""
        return self._read(name, (slice(None), slice(start, stop)))

    def check_shape(self, name: str, shape: Shape) -> None:
        """Raises InputError where the tensor is missing, has another shape, or is stored as something that is no plain float."""
        self.dtype(name)
        if self.shape(name) != shape:
            raise InputError(f"{self._path(name)}: tensor {name} must have shape {list(shape)}, as the folder's config says, "
                             f"got {list(self.shape(name))}; config and weights are of different models")

    def _path(self, name: str) -> Path:
        return self.folder / self.files[self.stored_name(name)]

    def _read(self, name: str, part: slice | tuple[slice, slice]) -> Tensor:
        try:
            return self._slice(name)[part].contiguous()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._path(name)}: tensor {name} can not be read: {error}; fetch the file again") from error

    def _slice(self, name: str) -> Any:
        stored = self.stored_name(name)
        if stored not in self.files:
            raise InputError(f"{self.folder} holds no tensor {name}, which the model must have; config and weights do not belong together")
        return self._file(self.files[stored]).get_slice(stored)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            check_inside(self.folder, path)
            if not path.is_file():
                raise InputError(f"{path} is missing, and the index names it; fetch the whole folder again")
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is not a whole safetensors file: {error}; fetch it again") from error
            self._check_against_index(path, set(file.keys()))
            self._open[name] = file
        return self._open[name]

    def _check_against_index(self, path: Path, held: set[str]) -> None:
        for name, file in self.files.items():
            if file == path.name and name not in held:
                raise InputError(f"{path} does not hold tensor {name}, and the index says it does; fetch the whole folder again")
            if file != path.name and name in held:
                raise InputError(f"tensor {name} is in {path} and, says the index, in {self.folder / file} too; fetch the folder again")


def check_inside(folder: Path, path: Path) -> None:
    """Raises InputError where `path`, its links followed, lies outside `folder`.

    A snapshot in Hugging Face's cache holds nothing but links into its repository's `blobs`: they count as inside.
    """
    home = folder.resolve()
    roots = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise InputError(f"{path} leads out of the folder {folder}, which is not followed; put the file itself into the folder")


def _read_index(path: Path) -> dict[str, str]:
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=_refuse_doubles)
        files = tree["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError("weight_map must map tensor names to file names")
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not an index of safetensors shards: {error}; fetch it again") from error
    for name, file in files.items():
        if Path(file).name != file or file in ("", ".."):
            raise InputError(f"{path}: tensor {name} must be in a file of this very folder, got {file!r}; fetch the index again")
        check_inside(path.parent, path.parent / file)
    return files


def _refuse_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in it twice")
    return tree
