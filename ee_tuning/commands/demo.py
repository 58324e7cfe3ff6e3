"""The whole way."""
import argparse
from pathlib import Path

from ee_tuning.commands.command import Command


def demo(args: argparse.Namespace) -> None:
    """The whole way with the shipped model."""
    from ee_tuning.evaluation.demo import demo

    demo(args.output)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER",
                        help="where the artifacts, report.json and the picture go (default %(default)s)")


COMMANDS = (
    Command(name="demo", summary="see the whole way in a few minutes: convert, tune and decode the small model that ships with this",
            examples="""\
  ee-tuning demo
  ee-tuning demo --output /tmp/demo""", add_arguments=_add_demo, run=demo),
)
