"""The table of commands. Each imports its code when it runs, so that `--help` is fast."""

from ee_tuning.commands import comparison, demo, evaluation, generation, models, pruning, serving, tuning
from ee_tuning.commands.command import Command

_ORDER = (
    "demo",
    "convert",
    "regenerate",
    "preprocess",
    "advise",
    "tune",
    "plan",
    "calibrate",
    "evaluate",
    "generate",
    "chat",
    "serve",
    "inspect",
    "profile",
    "prune",
    "compare",
    "export",
    "verify",
)
"""The order of commands in `ee-tuning --help`, which follows a typical use."""

_ALL = {
    command.name: command
    for module in (demo, models, pruning, comparison, tuning, generation, serving, evaluation)
    for command in module.COMMANDS
}
assert set(_ORDER) == set(_ALL), set(_ORDER) ^ set(_ALL)

COMMANDS: tuple[Command, ...] = tuple(_ALL[name] for name in _ORDER)
