"""A row of the table of commands, and functions shared by commands that run a job."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.flags import DEFAULTS, add_config_flags
from ee_tuning.storage.apart import check_apart


@dataclass(frozen=True, kw_only=True)
class Command:
    """A row of the table."""

    name: str
    summary: str
    """One line, for `ee-tuning --help`."""
    examples: str
    """Shown after the flags."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """Runs the command. May return an exit code other than 0."""


def job_of(args: argparse.Namespace, command: str = "") -> Config:
    """Loads the config of a command that needs a model. `command` selects its defaults."""
    config = load_config(args.config, args.overrides, DEFAULTS.get(command))
    if not config.model.path:
        raise InputError("model.path must name a model's folder, got none; give --model FOLDER or a config file")
    if args.config is not None and getattr(args, "output", None) is not None:
        check_apart(args.output, (args.config,))
    return config


def with_measured_layers(config: Config) -> Config:
    """Replaces auto:N:profile by layers, as `evaluation.profile.with_exit_layers` does, which is imported only here: it
    takes the whole model along.
    """
    if not config.exits.is_placed_by_profile:
        return config
    from ee_tuning.evaluation.profile import with_exit_layers

    return with_exit_layers(config)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Adds --profile."""
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="measure where the time goes: print milliseconds a step by part (attention, heads, loss, waiting, …), and write them to "
        "FOLDER with a trace of some steps for chrome://tracing or ui.perfetto.dev",
    )


def add_job(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds CONFIG, the flags of `command`, and --set."""
    # CONFIG first: after a flag with several values it would be taken for one of them
    parser.usage = f"ee-tuning {command} [CONFIG] [flags]"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the job; flags and --set overrule it")
    add_config_flags(parser, command)
