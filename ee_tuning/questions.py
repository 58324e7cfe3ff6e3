"""Questions that libraries put to a terminal find no answer here: what stands on standard input is the user's text, not
a yes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_questions() -> Iterator[None]:
    """Standard input is empty, and no terminal, within the block."""
    former = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = former
