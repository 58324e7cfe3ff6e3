"""Standard streams that are full, closed or gone, and Ctrl-C at any moment: a line at most, and no traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ee_tuning import cli
from ee_tuning.errors import InputError
from ee_tuning.interrupts import interrupts_raised, were_interrupted
from ee_tuning.standard_streams import OutputRefused
from ee_tuning.storage.atomic_write import os_errors_as_input_errors

PROGRAM, RESULTS = f"{sys.executable} -m ee_tuning", f'{sys.executable} -c "$QUICK"'
QUICK = """import sys, types
from ee_tuning import cli
def inspect_path(path, as_json, **_):
    for _ in range(3):
        print('x' * 40000)
        print('y', file=sys.stderr)
sys.modules['ee_tuning.artifact.inspect'] = fake = types.ModuleType('fake')
fake.inspect_path = inspect_path
sys.exit(cli.main(['inspect', 'folder']))
"""


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, env={**os.environ, "QUICK": QUICK}
    )


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"{PROGRAM} --help > /dev/full", "No space left"),
        (f"{PROGRAM} --version >&-", "Bad file descriptor"),
        (f"PYTHONUNBUFFERED=1 {PROGRAM} plan --help > /dev/full", "No space left"),
        (f"{RESULTS} > /dev/full 2> >(grep -v ^y >&2)", "No space left"),
        (f"{RESULTS} 2> >(grep -v ^y >&2) >&-", "Bad file descriptor"),
    ],
)
def test_output_that_can_not_be_written_is_one_line(command: str, reason: str):
    """A traceback, or exit code 0 for a table that went nowhere."""
    done = shell(command)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith(f"ee-tuning: error: standard output can not be written: {reason}")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (f"{RESULTS} 2>&- | wc -c; exit ${{PIPESTATUS[0]}}", 0, "120003"),
        (f"{RESULTS} 2> /dev/full | wc -c; exit ${{PIPESTATUS[0]}}", 0, "120003"),
        (f"{PROGRAM} --no-such-flag 2>&-", 2, ""),
        (f"{PROGRAM} --no-such-flag 2> /dev/full", 2, ""),
        (f"{PROGRAM} --help >&- 2>&-", 2, ""),
    ],
)
def test_standard_error_that_takes_nothing_ends_nothing(command: str, code: int, said: str):
    """A job of hours that ends because its log's disk is full; what belongs on standard error among the results."""
    done = shell(command)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, said, "")


def test_a_full_disk_anywhere_is_one_line_and_a_bug_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A traceback of a library that writes; an error of standard output told as one of the folder that is being
    written.
    """
    fake = ModuleType("ee_tuning.artifact.inspect")
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    raised: list[BaseException] = []

    def inspect_path(*_: Any, **__: Any) -> None:
        raise raised[-1]

    fake.inspect_path = inspect_path  # type: ignore[attr-defined]
    for number, words in (
        (errno.ENOSPC, "x.png can not be written: No space left"),
        (errno.EDQUOT, "can not be written: Disk quota"),
    ):
        raised.append(OSError(number, os.strerror(number), "x.png"))
        assert cli.main(["inspect", "folder"]) == 2 and words in capsys.readouterr().err
    raised.append(FileNotFoundError(errno.ENOENT, "no such file", "ours"))
    with pytest.raises(FileNotFoundError):
        cli.main(["inspect", "folder"])
    with pytest.raises(OutputRefused), os_errors_as_input_errors(Path("folder")):
        raise OutputRefused(errno.ENOSPC, "full")


@pytest.mark.parametrize(
    "becomes", [ImportError("cannot load module more than once"), InputError("the tokenizer can not be read"), None]
)
def test_an_interrupt_stays_one_whatever_a_library_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], becomes: Exception | None
):
    """Ctrl-C while transformers is imported, which comes out as a model that can not be read."""
    fake = ModuleType("ee_tuning.artifact.inspect")
    monkeypatch.setitem(sys.modules, fake.__name__, fake)

    def inspect_path(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), 2)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes from None

    fake.inspect_path = inspect_path  # type: ignore[attr-defined]
    assert cli.main(["inspect", "folder"]) == cli.INTERRUPTED == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("ee_tuning.interrupts._last", -100.0)


def test_ctrl_c_of_one_command_says_nothing_of_the_next() -> None:
    """A program that runs one command after another: each refusal within ten seconds of a Ctrl-C ends in 130, without
    its line.
    """
    with interrupts_raised():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert were_interrupted()
    with interrupts_raised():
        assert not were_interrupted()
