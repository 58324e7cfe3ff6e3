"""Reads tensors by slices from a folder of safetensors: one file, or shards with an index. Files are opened on demand.

Nothing in the folder is trusted: broken, missing or duplicate tensors, and names of files elsewhere, are refused with
the file's name.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content
from ee_tuning.json_file import read_json
from ee_tuning.storage.links import check_links
from ee_tuning.storage.missing_weights import no_weights
from ee_tuning.storage.open_files import unreadable
from ee_tuning.storage.safetensors_file import DTYPES, SafetensorsFile, TensorEntry, TensorRange
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource


class SafetensorsFolder(TensorSource):
    """`<stem>.safetensors`, or `<stem>.safetensors.index.json` and its shards, in `folder`. A context manager.

    Tensors are read to the CPU. Raises InputError, naming file and tensor, where one is missing, broken or duplicate,
    or a link is not trusted.
    """

    manifest_verified = False

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self._open: dict[str, SafetensorsFile] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self.table = single if single.exists() else index
        """The file that lists the tensors."""
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give the folder that holds {single.name}")
        self.files: dict[str, str] = {}
        """Tensor -> its file."""
        if single.exists():
            self.files = dict.fromkeys(self.file(single.name).entries, single.name)
        elif index.exists():
            self.files = _read_index(index)
        else:
            raise no_weights(folder, stem)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self.files)

    def weight_files(self) -> set[str]:
        """Returns the names of the files that hold tensors."""
        return set(self.files.values())

    def stored_name(self, name: str) -> str:
        """Returns the stored name of the tensor `name`."""
        return name

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype, one of float64, float32, float16 and bfloat16."""
        stored = self._entry(name).dtype
        if stored not in DTYPES:
            raise InputError(
                f"{self._path(name)}: tensor {name} is stored as {stored}, which is not supported; "
                f"convert the model to one of {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def full(self, name: str) -> Tensor:
        """Returns the whole tensor, as stored."""
        return self._read(name, ())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …], as stored. No other bytes are read."""
        return self._read(name, (slice(start, stop),))

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start], as stored."""
        return self._read(name, (slice(None), slice(start, stop)))

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing, has another shape, or is not stored as a plain float."""
        self.dtype(name)
        if self.shape(name) != shape:
            raise InputError(
                f"{self._path(name)}: tensor {name} must have shape {list(shape)}, as the folder's config says, "
                f"got {list(self.shape(name))}; config and weights are of different models"
            )

    def _path(self, name: str) -> Path:
        return self.folder / self.files[self.stored_name(name)]

    def _read(self, name: str, part: TensorRange) -> Tensor:
        return self._file_of(name).read(self.stored_name(name), part)

    def _entry(self, name: str) -> TensorEntry:
        return self._file_of(name).entries[self.stored_name(name)]

    def _file_of(self, name: str) -> SafetensorsFile:
        stored = self.stored_name(name)
        if stored not in self.files:
            raise InputError(
                f"{self.table} holds no tensor {name}, which the model must have; config and weights do not belong together"
            )
        return self.file(self.files[stored])

    def file(self, name: str) -> SafetensorsFile:
        """Opens the file of that name. Raises InputError where it is missing, broken, an untrusted link, or differs
        from the index.
        """
        if name not in self._open:
            path = self.folder / name
            check_links(self.folder, path)
            if not _is_file(path):
                raise InputError(f"{path} is missing, and {self.table} names it; fetch the whole folder again")
            file = SafetensorsFile(path)
            self._check_against_index(path, set(file.entries))
            self._open[name] = file
        return self._open[name]

    def _check_against_index(self, path: Path, held: set[str]) -> None:
        for name, file in self.files.items():
            if file == path.name and name not in held:
                raise InputError(
                    f"{path} does not hold tensor {name}, and {self.table} says it does; fetch the whole folder again"
                )
            if file != path.name and name in held:
                raise InputError(
                    f"tensor {name} is in {path} and, says {self.table}, in {self.folder / file} too; fetch the folder again"
                )
        if unlisted := held - self.files.keys() if self.files else ():
            raise InputError(
                f"{path} holds tensor {min(unlisted)}, which {self.table} does not name; fetch the whole folder again"
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # an impossible file name
        return False


def _read_index(path: Path) -> dict[str, str]:
    try:
        tree = read_json(path)
        files = tree["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError("weight_map must map tensor names to file names")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        if reason := describe_content(path):
            raise InputError(f"{path} {reason}") from error
        raise InputError(f"{path} is not an index of safetensors shards: {error}; fetch it again") from error
    for name, file in files.items():
        if Path(file).name != file or file in ("", "..") or not file.isprintable():
            raise InputError(
                f"{path}: tensor {name} must be in a file of this very folder, got {file!r}; fetch the index again"
            )
    return files
