"""The text every Python installation carries, its standard library: the shipped model learned from it, the demo tunes
with it.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3", "turtledemo"}


def is_held_out(name: str) -> bool:
    """About one file in thirty-two, by a hash of its name, so that every Python version holds out the same files."""
    return hashlib.sha256(name.encode()).digest()[0] % 32 == 0


def sample_corpus() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(training files, held-out files) by name: the sources, tests left out, and the documentation topics among
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
    """The docstrings of at least `shortest` characters in Python sources by name, file by file in the order of their
    names.
    """
    for name in sorted(files):
        for node in ast.walk(ast.parse(files[name])):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= shortest:
                    yield text
