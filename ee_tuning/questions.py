"""Suppresses questions that libraries ask at a terminal: standard input holds the user's text, not an answer."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_questions() -> Iterator[None]:
    """Makes standard input empty, and no terminal, within the block."""
    former = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = former
