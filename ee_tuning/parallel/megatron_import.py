"""The import of Megatron-core, without torch's compiler and without warnings.

Megatron-core decorates functions that it would fuse with `torch.compile`. The decoration alone imports torch's
compiler, which takes about a second in each process; the functions are called where fusions are on, which is nowhere
here (`model/backbone.py`). So they are compiled when they are first called.
"""

import functools
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def importing_megatron() -> Iterator[None]:
    """Megatron-core is imported while the context is open, and nothing else is done there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core warns of each optional library that is not installed
        if "megatron.core.jit" in sys.modules:  # it has taken its decorator already
            yield
            return
        compile_now = torch.compile

        def compile_when_called(function: Any = None, **options: Any) -> Any:
            if isinstance(function, types.FunctionType) and not options:
                return _compiled_when_called(function)
            return compile_now(function, **options)

        torch.compile = compile_when_called  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compile_now


def _compiled_when_called(function: types.FunctionType) -> Any:
    compiled = None

    @functools.wraps(function)
    def called(*args: Any, **keys: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():  # it is traced with its caller
            return function(*args, **keys)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **keys)

    return called
