"""The allow-list of names in pickles of checkpoints. Nothing is imported for a name, and no code of a pickle runs.

Megatron-LM saves data beside a model: namespaces, dtypes, enumerations, signals, paths, random states, configurations.
The few objects that are used are built; classes of Megatron, Transformer Engine or numpy, and everything else that is
only carried along, become an `Inert`. Functions, except the few that build arrays, are refused, and so is every other
name.
"""

import _compat_pickle
import argparse
import collections
import re
import types
from typing import Any

import torch

_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "argparse.Namespace": argparse.Namespace,
    "torch.Size": tuple,
    "types.SimpleNamespace": types.SimpleNamespace,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
}
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}
"""torch's own dtypes, by their names in pickles."""
_CARRIED = {
    *(
        f"builtins.{name}"
        for name in (
            "bool",
            "bytearray",
            "bytes",
            "dict",
            "float",
            "int",
            "list",
            "object",
            "range",
            "slice",
            "str",
            "tuple",
        )
    ),
    *(f"collections.{name}" for name in ("Counter", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    ),
    *(
        f"numpy.{module}.{name}"
        for module in ("core.multiarray", "_core.multiarray", "core.numeric", "_core.numeric")
        for name in ("_reconstruct", "scalar", "_frombuffer")
    ),
    *(
        f"torch.{name}"
        for name in (
            "device",
            "Generator",
            "_C.Generator",
            "memory_format",
            "storage._load_from_bytes",
            "layout",
            "serialization._get_layout",
        )
    ),
    "_codecs.encode",
    "_io.BytesIO",
    "io.BytesIO",
    "copyreg._reconstructor",
    "uuid.UUID",
    "decimal.Decimal",
}
_CLASS = re.compile(r"(megatron|transformer_engine|numpy)(\.\w+)*\._?[A-Z]\w*(\.[A-Z]\w*)*")
"""A class name, in whichever module a package's versions keep it."""
_NUMPY = re.compile(r"numpy\.(ndarray|dtype|bool_?|str_|bytes_|(u?int|float|complex)\d+)")
_SIGNAL = re.compile(r"signal\.(Signals|Handlers|SIG[A-Z0-9_]+)")


class Inert:
    """Replaces an object that is not used: accepts whatever the pickle does to it, and does nothing."""

    def __init__(self, *arguments: Any, **_: Any):
        self._arguments = arguments

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Does nothing."""

    extend = add = append

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"an object of {', '.join(map(repr, self._arguments))}"


def plain_name(module_name: str, global_name: str) -> str:
    """Returns the name that a pickle asks for with Python 3's spelling; torch.save still writes Python 2's."""
    module_name, global_name = _compat_pickle.NAME_MAPPING.get((module_name, global_name), (module_name, global_name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module_name, module_name)}.{global_name}"


def harmless(name: str) -> Any:
    """Returns the replacement for a name in a pickle (`plain_name`). Raises KeyError where it is on no list."""
    for table in (_KNOWN, DTYPES):
        if name in table:
            return table[name]
    if name in _CARRIED or _CLASS.fullmatch(name) or _NUMPY.fullmatch(name):
        return Inert
    # Python 3.12 pickles a signal as a name of its module, earlier versions as Signals(number).
    if match := _SIGNAL.fullmatch(name):
        return Inert if match[1] in ("Signals", "Handlers") else Inert(match[1])
    raise KeyError(name)
