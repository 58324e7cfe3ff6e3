"""`.metadata` of a distributed checkpoint is a pickle, and torch runs whatever it holds: here it is looked through first."""
import io
import pickle
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# Whole names only: a pickle may ask for `name.attribute`, and a module of torch holds `os` among its attributes.
_NAMES = {
    f"{_DCP}.metadata": ("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata",
                         "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
}
# Classes without content that Megatron-core 0.15 left in its own checkpoints.
_EMPTY = {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}


class _Empty:
    """Takes the place of one of `_EMPTY`: a plain holder of attributes."""


class _LookingThrough(pickle._Unpickler):  # the one in Python: the one in C makes room for any memo index that a pickle names
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _EMPTY:
            return _Empty
        if global_name not in _NAMES.get(module_name, ()):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def check_metadata_pickle(folder: Path) -> None:
    """Raises InputError where `.metadata` in `folder` can not be read, or asks for what no checkpoint's description needs."""
    read_metadata_pickle(folder)


def read_metadata_pickle(folder: Path) -> Any:
    """The description of a distributed checkpoint (torch's `Metadata`, its fields as yet unchecked). Raises as `check_metadata_pickle`."""
    path = folder / METADATA
    try:
        return _LookingThrough(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a pickle that is broken on purpose may raise anything
        raise InputError(f"{path} is not the description of a distributed checkpoint: {error}; do not load this checkpoint") from error
