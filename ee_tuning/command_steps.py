"""Steps of a longer work: commands as a user would type them, each run once."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ee_tuning.errors import InputError

_ERROR = "ee-tuning: error: "
_INTERRUPTED = {130, -signal.SIGINT}
"""Exit codes of a command that Ctrl-C ended."""


@dataclass(frozen=True)
class Step:
    """A step of a longer work."""

    title: str
    makes: Path
    """Its output, which exists exactly if the step is finished."""
    run: Callable[[], None]
    minutes: float = 0
    """Approximate duration; 0 where it is not known."""
    tokens: int = 0
    """Tokens that it trains on, or fits to."""


def run_steps(console: Console, steps: list[Step]) -> float:
    """Runs the steps whose output does not exist yet, in order. Returns the seconds taken."""
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        console.rule(f"{number} of {len(steps)}: {step.title}", align="left")
        run_step(console, step)
    return time.monotonic() - began


def run_step(console: Console, step: Step) -> None:
    """Runs a step unless its output exists. Raises InputError where it made none."""
    if step.makes.exists():
        console.print(f"done already: {step.makes}", soft_wrap=True)
        return
    started = time.monotonic()
    step.run()
    if not step.makes.exists():
        raise InputError(f"the step made no {step.makes}, see above: {step.title}")
    console.print(f"{time.monotonic() - started:.0f} s", style="dim")


def run_command(console: Console, command: list[str], log: Path | None = None) -> None:
    """Prints a command as a user would type it, and runs it. What it prints is also kept in `log`.

    Raises InputError, with the command's own error, where it fails. After Ctrl-C it waits for the command to end.
    """
    text = _as_typed(command)
    console.print(f"$ {text}", style="bold", soft_wrap=True, markup=False)
    # One thread per process under torchrun, since they share the machine.
    threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
    environment = {**os.environ, **threads, "PYTHONUNBUFFERED": "1"}
    code, last = _run_to_its_end(command, environment, log)
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        reason = f": {last}" if last else ", see above"
        raise InputError(f"`{text}` ended with exit code {code}{reason}")


def _run_to_its_end(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """Returns the exit code, and the line of the command's own error where its output is kept."""
    piped = {} if log is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, **piped) as process:  # type: ignore[call-overload]
        try:
            return _followed(process, log)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # Ctrl-C reached the command, too
                process.terminate()
            _followed(process, log)  # a run saves what it has, and says so
            raise


def _followed(process: "subprocess.Popen[bytes]", log: Path | None) -> tuple[int, str]:
    """Prints and keeps the lines of a command."""
    if log is None:
        return process.wait(), ""
    error = last = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    assert process.stdout is not None
    with log.open("ab") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            text = line.decode("utf-8", "replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            last = text.strip() or last
            error = text.strip().removeprefix(_ERROR) if text.startswith(_ERROR) else error
    return process.wait(), error or last


def _as_typed(command: list[str]) -> str:
    shown = [
        "torchrun" if part == "torch.distributed.run" else "python" if part == sys.executable else part
        for part in command
    ]
    text = shlex.join(shown).replace("python -m torchrun --standalone", "torchrun")
    return text if "torchrun" in shown else text.replace("python -m ee_tuning", "ee-tuning")


Flag = str | int | float | Path | list[str | Path] | bool
"""Value of a flag: a list repeats the flag, and True stands for a flag without a value."""


def ee_tuning(command: str, *words: str | Path, **flags: Flag) -> list[str]:
    """Returns the command line of one of this program's commands. A flag's dashes are underscores in `flags`."""
    line = [sys.executable, "-m", "ee_tuning", command, *map(str, words)]
    for name, value in flags.items():
        for each in value if isinstance(value, list) else [value]:
            line += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return line


def under_torchrun(num_processes: int, command: list[str]) -> list[str]:
    """Returns a Python command line that torchrun starts in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [command[0], *launcher, *command[1:]]
