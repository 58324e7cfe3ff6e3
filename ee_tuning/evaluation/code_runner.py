"""Runs programs that a model wrote, each in a process of its own with limits: time, memory, files, processes, network
where it can be.

That is care, not a sandbox: run it in a container or on a machine that has nothing to lose. Nothing is run unasked.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ee_tuning.json_file import parse_json, to_json

SECONDS = 10
"""The time limit of a program, by the clock; the same for processor time."""
MEMORY = 2**30
"""Bytes of address space."""
_PROGRAM = Path(__file__).with_name("confined_program.py")


class ProgramResult(NamedTuple):
    """How a program ended."""

    passed: bool
    verdict: str
    """passed, timed out, or failed and why."""
    has_no_network: bool
    """Whether the system took the network away; else Python's sockets alone were refused."""


def run_programs(programs: Sequence[str], *, seconds: int = SECONDS, memory: int = MEMORY) -> list[ProgramResult]:
    """The outcome of each, as many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_program(program, seconds=seconds, memory=memory), programs))


def run_program(program: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> ProgramResult:
    """Passed is a program that comes to its end: not one that raises, leaves, is killed or takes too long."""
    token, (reads, writes) = secrets.token_hex(16), os.pipe()
    asked = {"program": program, "seconds": seconds, "memory": memory, "descriptor": writes, "token": token}
    try:
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                pass_fds=(writes,),
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            is_late = _ended_late(process, to_json(asked).encode(), seconds)
        os.set_blocking(reads, False)
        return _outcome(_read(reads), token, is_late, process.returncode)
    finally:
        os.close(reads)
        os.close(writes)


def _ended_late(process: "subprocess.Popen[bytes]", asked: bytes, seconds: int) -> bool:
    """Whether it had to be ended. All of its session is gone afterwards."""
    try:
        process.communicate(asked, timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def _outcome(said: bytes, token: str, is_late: bool, code: int) -> ProgramResult:
    try:
        tree: Any = parse_json(said)
        verdict, (word, has_no_network) = str(tree["outcome"]), str(tree["token"]).split()
    except (ValueError, KeyError, TypeError):
        word = ""
    if word != token:
        late = is_late or code in (-signal.SIGXCPU, -signal.SIGKILL)
        return ProgramResult(False, "timed out" if late else f"failed: ended with {code}", False)
    return ProgramResult(verdict == "passed", verdict, has_no_network == "True")
