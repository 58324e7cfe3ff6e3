"""An output that takes long to write has one owner."""

import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ee_tuning import cli
from ee_tuning.errors import InputError
from ee_tuning.storage import owner
from ee_tuning.storage.owner import Owner, owned

MODEL = Path(__file__).parents[2] / "examples/tiny-python-llama"


def test_a_second_job_is_refused_by_the_first_ones_name(tmp_path: Path) -> None:
    """Two jobs into one folder: configuration and checkpoints of the one, the artifact of the other, both with exit
    code 0.
    """
    output = tmp_path / "made" / "out"
    with owned(output, None):
        name = rf"out is being written by process {os.getpid()} on {socket.gethostname()} \(since .*; wait"
        with pytest.raises(InputError, match=name), owned(output, None):
            raise AssertionError("two owners")
        assert output.parent.exists()
        with owned(tmp_path / "made" / "other", None):
            pass
    assert not output.parent.exists(), "a job that came to nothing leaves a folder"
    with owned(output, None):
        output.touch()
    assert list(output.parent.iterdir()) == [output]


def test_a_killed_owner_keeps_nobody_out(tmp_path: Path) -> None:
    """A requeued job that is refused because of its own former life, until somebody removes a file by hand."""
    output, ready = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:
        with owned(output, None):
            os.write(ready[1], b"!")
            signal.pause()
    os.read(ready[0], 1)
    with pytest.raises(InputError, match=f"process {child} on"), owned(output, None):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".out.owner").exists()
    with owned(output, None):
        pass
    assert not list(tmp_path.iterdir())


def _no_locks(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(
    ("change", "is_free"),
    [
        (lambda it: it, False),
        (lambda it: replace(it, host="another-machine"), True),
        (lambda it: replace(it, started=it.started - 60), True),
        (lambda it: replace(it, pid=2**22 + 1), True),
    ],
    ids=["running", "other machine", "number reused", "gone"],
)
def test_without_locks_the_process_is_looked_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Owner], Owner],
    is_free: bool,
) -> None:
    """A file system without locks: a living owner of this machine overrun, or a dead one that blocks for ever."""
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    there = change(Owner.current())
    (tmp_path / ".out.owner").write_text(json.dumps(asdict(there)))
    if is_free:
        with owned(tmp_path / "out", None):
            pass
        assert ("make sure that it is not" in capsys.readouterr().err) == (there.host == "another-machine")
    else:
        with pytest.raises(InputError, match="is being written by process"), owned(tmp_path / "out", None):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1}'])
def test_a_lock_file_without_a_name_is_no_obstacle(tmp_path: Path, content: str) -> None:
    """A job killed between making its lock file and writing its name: a traceback for all that follow."""
    (tmp_path / ".out.owner").write_text(content)
    with owned(tmp_path / "out", None):
        assert owner._read_owner(tmp_path / ".out.owner") == Owner.current()


@pytest.mark.parametrize(
    "command",
    [
        ["tune", "--model", str(MODEL), "--exit-layers", "3", "--data", str(MODEL / "README.md"), "--output"],
        ["convert", "--model", str(MODEL), "--exit-layers", "3", "--output"],
        ["export", "--format", "hf", "--model", str(MODEL), "--output"],
        ["export", "--format", "megatron", "--model", str(MODEL), "--output"],
        ["preprocess", "--data", str(MODEL / "README.md"), "--tokenizer", str(MODEL), "--output"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_commands_respect_an_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """A command that does not ask, and replaces what another one is about to finish."""
    output = tmp_path / "out"
    lock_file = output / ".owner" if command[0] == "tune" else None
    with owned(output, None, lock_file=lock_file):
        assert cli.main([*command, str(output)]) == 2
    assert f"{output} is being written by process {os.getpid()}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
