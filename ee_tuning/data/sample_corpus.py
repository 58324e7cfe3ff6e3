"""A corpus on every machine: Python's standard library. The shipped model was trained on it, and the demo tunes with
it.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3", "turtledemo"}


def is_held_out(name: str) -> bool:
    """Whether a file is held out: about one in thirty-two, by a hash of its name, the same for every Python version."""
    return hashlib.sha256(name.encode()).digest()[0] % 32 == 0


def sample_corpus() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Returns (training files, held-out files) by name: sources without tests, and the documentation topics among
    them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    training: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            (held_out if is_held_out(name) else training)[name] = path.read_bytes()
    return training, held_out


def documentation_strings(files: dict[str, bytes], shortest: int = 200) -> Iterator[str]:
    """Yields the docstrings of at least `shortest` characters in Python sources, file by file in the order of names."""
    for name in sorted(files):
        for node in ast.walk(ast.parse(files[name])):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= shortest:
                    yield text
