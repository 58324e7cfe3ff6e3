"""Started as a program of its own, by `code_runner.py`: runs what a model wrote, within limits, and says whether it
ended well.

It reads one JSON object from standard input, and writes its token to the file descriptor that it is given once the
program has run to its end. This is no sandbox: what Python's audit hooks do not see, a hostile program can still do.
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
    """Limits processor time, bytes of address space, files and processes, for good."""
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
    """Whether this process is now in a network of its own, in which there is nothing; where the system lets it."""
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER_AND_NETWORK) == 0
    except (OSError, AttributeError):
        return False


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578)."""
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if is_write or event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused")


def reporter(descriptor: int, token: str) -> Callable[[str], None]:
    """What says how it ended, under a name that the program is not told."""

    def say(outcome: str) -> None:
        os.write(descriptor, json.dumps({"token": token, "outcome": outcome[:300]}).encode())

    return say


def main() -> None:
    """Runs the program of standard input."""
    asked = json.load(sys.stdin)
    has_no_network = leave_network()
    limit(asked["seconds"], asked["memory"])
    say = reporter(asked["descriptor"], f"{asked['token']} {has_no_network}")
    program = asked["program"]
    del asked
    sys.addaudithook(refuse)
    try:
        exec(compile(program, "<completion>", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit, too: a program that leaves has not passed
        say(f"failed: {type(error).__name__}: {error}")
    else:
        say("passed")


if __name__ == "__main__":
    main()
