"""Checks the pickle `.metadata` of a distributed checkpoint before torch unpickles it, which would run any code in
it.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.storage.pickled_names import DTYPES, harmless, plain_name

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# Whole names only: a pickle may ask for `name.attribute`, and a module of torch holds `os` among its attributes.
_NAMES = {
    f"{_DCP}.metadata": (
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", *(name.removeprefix("torch.") for name in DTYPES)),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
}
# Classes without content that Megatron-core 0.15 left in its own checkpoints.
_EMPTY = {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}


class _Empty:
    """Replaces a class of `_EMPTY`: a plain holder of attributes."""


# The pure Python unpickler: the one in C allocates for any memo index in a pickle.
class _NameCheckingUnpickler(pickle._Unpickler):
    def __init__(self, path: Path, *, passes_over: bool):
        super().__init__(io.BytesIO(path.read_bytes()))
        self._passes_over = passes_over

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _EMPTY:
            return _Empty
        if global_name in _NAMES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        try:
            if self._passes_over:
                return harmless(plain_name(module_name, global_name))
        except KeyError:
            pass
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def check_metadata_pickle(folder: Path) -> None:
    """Raises InputError where `.metadata` in `folder` can not be read, or names anything that no checkpoint's metadata
    needs.

    torch, which reads it next, imports and calls whatever it names.
    """
    _read(folder / METADATA, passes_over=False)


def read_metadata_pickle(folder: Path) -> Any:
    """Reads the metadata of a distributed checkpoint (torch's `Metadata`, with fields still unchecked).

    Other plain data, such as the path that it was written to, is skipped. Raises InputError where the file can not be
    read or names anything else.
    """
    return _read(folder / METADATA, passes_over=True)


def _read(path: Path, *, passes_over: bool) -> Any:
    try:
        return _NameCheckingUnpickler(path, passes_over=passes_over).load()
    except Exception as error:  # a malicious pickle may raise anything
        raise InputError(
            f"{path} is not the description of a distributed checkpoint: {error}; do not load this checkpoint"
        ) from error
