"""Lines for the user on standard error: notes, and warnings that are no reason to stop."""

import os
import sys

_shown_lines: set[str] = set()


def say(line: str) -> None:
    """Prints a line."""
    print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Prints a warning."""
    say(f"ee-tuning: warning: {line}")


def warn_once(line: str) -> None:
    """Prints a warning, once, on the first process that torchrun started."""
    if line not in _shown_lines and os.environ.get("RANK", "0") == "0":
        warn(line)
    _shown_lines.add(line)
