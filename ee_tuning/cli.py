"""`ee-tuning COMMAND`: parses the command line and runs a row of the table in `commands`.

A user's mistake ends in one line on stderr and exit code 2. Any other error is a bug and keeps its traceback.
"""

import argparse
import difflib
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ee_tuning import __version__
from ee_tuning.commands import COMMANDS
from ee_tuning.config import INTEGER_LIMIT
from ee_tuning.config.paths import expanded
from ee_tuning.errors import InputError
from ee_tuning.interrupts import interrupts_raised, were_interrupted
from ee_tuning.openmp import shorten_spins
from ee_tuning.parallel.launcher import RendezvousError, adopt_slurm_step, is_first
from ee_tuning.standard_streams import output_error_text, prepare_streams, settle_output
from ee_tuning.utf8 import typed_text, use_utf8

LOST_RANK = 1
"""Exit code of a rank that lost another one, which is neither a user's mistake nor a bug."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
NO_TRITON = (
    "Megatron-core 0.19, which pip takes on Python 3.12 and later, imports triton without asking pip for it, and "
    "torch's build for CPUs does not bring it; pip install triton"
)
"""Message for users of that build, instead of a traceback."""
_TEXTS = ("prompt", "system")
"""Arguments that are texts for a model."""


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises InputError and accepts no abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(
            *args, **{**options, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        )

    def error(self, message: str) -> NoReturn:
        flag = re.fullmatch(r"argument (--[\w-]+): expected (one|at least one) argument", message)
        hint = f"; one that begins with a hyphen is written {flag[1]}=…" if flag else ""
        raise InputError(f"{message}{hint}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse itself ignores a stream that refuses output

    def flag_names(self) -> list[str]:
        """Returns all flags."""
        return [flag for action in self._actions for flag in action.option_strings]


def build_parser() -> _Parser:
    """Builds the parser of all commands. The namespace holds the chosen row as `command`."""
    parser = _Parser(
        prog="ee-tuning",
        description="Turn a trained LLM into an early-exit LLM: convert it, tune only the exits, decode faster.",
        epilog="`ee-tuning COMMAND --help` explains a command by examples. Start with `ee-tuning demo`.",
    )
    parser.add_argument("--version", action="version", version=f"ee-tuning {__version__}")
    rows = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        row = rows.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="examples:\n" + command.examples,
        )
        command.add_arguments(row)
        row.set_defaults(command=command, parser=row)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises InputError on unknown arguments, with the most similar flag."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    for name, value in vars(args).items():
        _check_size(name, value)
        setattr(args, name, _as_meant(name, value))
    if unknown:
        row: _Parser = getattr(args, "parser", parser)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], row.flag_names(), n=1, cutoff=0.7)
        raise InputError(
            f"{row.prog} takes no {unknown[0]}; " + (f"did you mean {near[0]}?" if near else f"see `{row.prog} --help`")
        )
    return args


def _check_size(name: str, value: Any) -> None:
    """Raises InputError where a number of an argument is not below INTEGER_LIMIT."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, int) and abs(each) >= INTEGER_LIMIT:
            raise InputError(
                f"--{name.replace('_', '-')} must be a number below 2^63, got one of {each.bit_length()} bits; give a smaller one"
            )


def _as_meant(name: str, value: Any) -> Any:
    """Returns an argument as the user meant it: paths expanded, and texts for a model decoded as UTF-8."""
    if isinstance(value, Path):  # shells do not expand the ~ of --output=~/x
        value = Path(expanded(str(value), f"--{name.replace('_', '-')}"))
        if name == "output" and value.name in ("", ".."):
            raise InputError(
                f"--output must end in a name, because it is first written beside its destination, got {value}; give {value / 'NAME'}"
            )
    elif name == "config" and isinstance(value, str):
        value = expanded(value, "CONFIG")
    elif name in _TEXTS and value is not None:
        value = typed_text(value) if isinstance(value, str) else list(map(typed_text, value))
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    use_utf8()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns whenever a process forks after tokenizing
    shorten_spins()
    prepare_streams()
    adopt_slurm_step()
    had_world = _world_size() > 0
    try:
        with interrupts_raised():
            return _outcome(sys.argv[1:] if argv is None else argv)
    finally:
        settle_output()
        # The command failed half-way; the next one of this process builds its own groups.
        if not had_world and _world_size() == 1:
            from ee_tuning.parallel.topology import destroy_parallel

            destroy_parallel()


def _world_size() -> int:
    """Returns the size of the joined world, or 0 if none was joined."""
    distributed = sys.modules.get("torch.distributed")
    return distributed.get_world_size() if distributed is not None and distributed.is_initialized() else 0


def _outcome(argv: Sequence[str]) -> int:
    try:
        try:
            code = _run(argv)
        except SystemExit:  # raised by --help and --version
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, so that a closed pipe or a full disk is noticed here
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 141
    except Exception as error:
        if were_interrupted():  # a library turned it into another exception
            return INTERRUPTED
        if isinstance(error, InputError):
            if isinstance(error, RendezvousError) or _speaks():
                _say(str(error))
            return 2
        if isinstance(error, OSError) and (line := output_error_text(error)) is not None:
            _say(line)
            return 2
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            if is_first():
                _say(NO_TRITON)
            return 2
        if (line := _lost_rank_text(error)) is not None:
            _say(line)
            return LOST_RANK
        raise


def _lost_rank_text(error: Exception) -> str | None:
    """Returns one line where this rank lost another one, else None. Each rank prints its own."""
    watchdog = sys.modules.get("ee_tuning.parallel.watchdog")
    lost = None if watchdog is None else watchdog.lost_rank_text(error)
    if lost is None:
        return None
    return f"{lost} (on {platform.node()}); the rank that failed first reports why; the same command goes on from what was saved"


def _run(argv: Sequence[str]) -> int:
    args = parse(argv)
    if not hasattr(args, "command"):
        build_parser().print_help(sys.stderr)
        return 2
    return args.command.run(args) or 0


def _say(line: str) -> None:
    print(f"ee-tuning: error: {' '.join(line.split())}", file=sys.stderr)


def _speaks() -> bool:
    """Whether this process prints the error: among many that failed, one; before they have joined, rank 0."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or _world_size() <= 1:
        return is_first()
    try:
        return distributed.distributed_c10d._get_default_store().add("ee_tuning/error", 1) == 1
    except RuntimeError:  # the host of the store has already ended
        return True
