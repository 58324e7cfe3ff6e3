"""Commands as steps: what they print is kept, and how they end is told."""

import io
import signal
import sys
from pathlib import Path

import pytest
from refusals import refusal
from rich.console import Console

from ee_tuning.command_steps import ee_tuning, run_command, under_torchrun
from ee_tuning.interrupts import term_raises


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_failed_command_says_why(tmp_path: Path):
    """A row that says `exit code 2` while the reason scrolled away hours ago."""
    program = (
        "import sys; print('step 1'); print('ee-tuning: error: a rule', file=sys.stderr); print('bye'); sys.exit(2)"
    )
    shown, log = console(), tmp_path / "logs" / "step.log"
    said = refusal(run_command, shown, [sys.executable, "-c", program], log)
    assert said.endswith("ended with exit code 2: a rule")
    assert set(log.read_text().split("\n")[:-1]) == {"step 1", "ee-tuning: error: a rule", "bye"}
    run_command(shown, [sys.executable, "-c", "print('again')"], log)
    assert "step 1" in log.read_text() and "again" in log.read_text(), "a second try does not hide the first"


@pytest.mark.parametrize("end", ["sys.exit(130)", f"os.kill(os.getpid(), {int(signal.SIGINT)})"])
def test_an_interrupted_command_ends_all(tmp_path: Path, end: str):
    """Ctrl-C that only skips to the next of twenty steps."""
    program = f"import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); {end}"
    with pytest.raises(KeyboardInterrupt):
        run_command(console(), [sys.executable, "-c", program], tmp_path / "log")


def test_a_command_that_is_terminated_is_heard_to_its_end(tmp_path: Path):
    """SIGTERM for the parent alone: the last words of a run that saves a checkpoint, written into a closed pipe."""
    program = (
        "import os, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.2); print('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30); print('was never ended')"
    )
    with pytest.raises(SystemExit), term_raises():
        run_command(console(), [sys.executable, "-c", program], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "saved\n"


def test_commands_are_shown_as_typed():
    """A command that can not be copied, with this machine's path of Python in it."""
    shown = console()
    line = [*ee_tuning("inspect", model="m")[:3], "--version"]
    run_command(shown, line)
    assert shown.file.getvalue() == "$ ee-tuning --version\n"
    parts = under_torchrun(4, ee_tuning("tune", "job.yaml", set=["a=1", "b=2"], speculative=True))
    assert parts[1:3] == ["-m", "torch.distributed.run"]
    assert parts[-5:] == ["--set", "a=1", "--set", "b=2", "--speculative"]
