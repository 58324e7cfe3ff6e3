"""A script that code_runner.py starts: runs a program that a model wrote, within limits, and reports the outcome.

It reads one JSON object from standard input, and writes its token to the given file descriptor when the program has
reached its end. This is no sandbox: a malicious program can still do anything that Python's audit hooks do not see.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

_NEW_USER_AND_NETWORK = 0x10000000 | 0x40000000  # CLONE_NEWUSER | CLONE_NEWNET of Linux
_REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.putenv",
    "shutil.",
    "ctypes.",
    "signal.pthread_kill",
    "sqlite3.",
    "ftplib.",
    "smtplib.",
    "urllib.",
    "http.client.",
    "webbrowser.",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(seconds: int, memory: int) -> None:
    """Limits processor time, bytes of address space, files and processes, permanently."""
    for name, most in (
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (most, most))


def leave_network() -> bool:
    """Moves this process to an empty network namespace. Returns whether the system allows it."""
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER_AND_NETWORK) == 0
    except (OSError, AttributeError):
        return False


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578) that raises on forbidden events."""
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if is_write or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused")


def reporter(descriptor: int, token: str) -> Callable[[str], None]:
    """Returns a function that reports the outcome, with a token that the program does not know."""

    def say(outcome: str) -> None:
        os.write(descriptor, json.dumps({"token": token, "outcome": outcome[:300]}).encode())

    return say


def main() -> None:
    """Runs the program from standard input."""
    asked = json.load(sys.stdin)
    has_no_network = leave_network()
    limit(asked["seconds"], asked["memory"])
    say = reporter(asked["descriptor"], f"{asked['token']} {has_no_network}")
    program = asked["program"]
    del asked
    sys.addaudithook(refuse)
    try:
        exec(compile(program, "<completion>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit, too: a program that exits has not passed
        say(f"failed: {type(error).__name__}: {error}")
    else:
        say("passed")


if __name__ == "__main__":
    main()
