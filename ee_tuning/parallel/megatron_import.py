"""The import of Megatron-core, without torch's compiler and without warnings.

Megatron-core decorates functions that it would fuse with `torch.compile`. The decoration alone imports torch's
compiler, which takes over a second in each process. All fusions are off here (`model/backbone.py`), so the functions
stay as they are. A program that wants Megatron-core's own fusions imports it before this package does.
"""

import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def importing_megatron() -> Iterator[None]:
    """Megatron-core is imported while the context is open, and nothing else is done there."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core warns of each optional library that is not installed
        if "megatron.core.jit" in sys.modules:  # it has taken its decorator already
            yield
            return
        compiled = torch.compile

        def as_it_is(model: Any = None, **options: Any) -> Any:
            is_plain = isinstance(model, types.FunctionType) and not options
            return model if is_plain else compiled(model, **options)

        torch.compile = as_it_is
        try:
            yield
        finally:
            torch.compile = compiled
