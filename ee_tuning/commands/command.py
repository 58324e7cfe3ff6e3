"""A row of the table of commands, and what commands that run a job share."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ee_tuning.checkpoint.apart import check_apart
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.flags import DEFAULTS, add_config_flags


@dataclass(frozen=True, kw_only=True)
class Command:
    """One row of the table."""

    name: str
    summary: str
    """One line, for `ee-tuning --help`."""
    examples: str
    """Shown after the flags."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """May return an exit code other than 0."""


def job_of(args: argparse.Namespace, command: str = "") -> Config:
    """The config of a command that needs a model; `command` is one with defaults of its own."""
    config = load_config(args.config, args.overrides, DEFAULTS.get(command))
    if not config.model.path:
        raise InputError("model.path must name a model's folder, got none; give --model FOLDER or a config file")
    if args.config is not None and getattr(args, "output", None) is not None:
        check_apart(args.output, (args.config,))
    return config


def add_job(parser: argparse.ArgumentParser, command: str) -> None:
    """CONFIG, the flags of `command`, and --set."""
    # CONFIG first: after a flag that takes several values it would be one of them
    parser.usage = f"ee-tuning {command} [CONFIG] [flags]"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the job; flags and --set overrule it")
    add_config_flags(parser, command)
