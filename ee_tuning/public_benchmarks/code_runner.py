"""Runs programs that a model wrote, each in its own process with limits on time, memory, files, processes and network.

These limits are a precaution, not a sandbox: run it in a container or on a machine with nothing to lose. No program
runs without the user's permission.
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
"""Limit of a program's wall-clock time and of its processor time."""
MEMORY = 2**30
"""Bytes of address space."""
_PROGRAM = Path(__file__).with_name("confined_program.py")


class ProgramResult(NamedTuple):
    """The outcome of a program."""

    passed: bool
    verdict: str
    """passed, timed out, or failed with a reason."""
    has_no_network: bool
    """Whether the system removed the network; otherwise only Python's sockets were refused."""


def run_programs(programs: Sequence[str], *, seconds: int = SECONDS, memory: int = MEMORY) -> list[ProgramResult]:
    """Returns the outcome of each program. As many run at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_program(program, seconds=seconds, memory=memory), programs))


def run_program(program: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> ProgramResult:
    """Runs a program. It passes if it reaches its end, and not if it raises, exits, is killed or takes too long."""
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
    """Waits for the process and returns whether it had to be ended. Its whole session is killed afterwards."""
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
