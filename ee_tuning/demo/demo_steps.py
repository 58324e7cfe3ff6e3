"""Steps of the demos: commands as a user would type them, each run once."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ee_tuning.errors import InputError


@dataclass(frozen=True)
class Step:
    """A step of a demo."""

    title: str
    minutes: float
    """Approximate duration."""
    makes: Path
    """Its output, which exists exactly if the step is finished."""
    run: Callable[[], None]


def run_steps(console: Console, steps: list[Step]) -> float:
    """Runs the steps whose output does not exist yet, in order. Returns the seconds taken."""
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        console.rule(f"{number} of {len(steps)}: {step.title}", align="left")
        if step.makes.exists():
            console.print(f"done already: {step.makes}", soft_wrap=True)
            continue
        started = time.monotonic()
        step.run()
        if not step.makes.exists():
            raise InputError(f"the demo's step made no {step.makes}, see above: {step.title}")
        console.print(f"{time.monotonic() - started:.0f} s", style="dim")
    return time.monotonic() - began


def run_command(console: Console, command: list[str]) -> None:
    """Prints a command as a user would type it, and runs it. Raises InputError where it fails."""
    shown = [
        "torchrun" if part == "torch.distributed.run" else "python" if part == sys.executable else part
        for part in command
    ]
    text = shlex.join(shown).replace("python -m torchrun --standalone", "torchrun")
    console.print(
        f"$ {text.replace('python -m ee_tuning', 'ee-tuning')}" if "torchrun" not in shown else f"$ {text}",
        style="bold",
        soft_wrap=True,
    )
    # One thread per process under torchrun, since they share the machine.
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {})}
    done = subprocess.run(command, env=environment)
    if done.returncode:
        raise InputError(f"the demo's command ended with exit code {done.returncode}, see above: {text}")


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
