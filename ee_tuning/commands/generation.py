"""Commands that decode."""
import argparse

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.errors import InputError


def generate(args: argparse.Namespace) -> None:
    """Prompts -> completions."""
    config = job_of(args)
    if not args.prompt:
        raise InputError("generate needs a prompt, got none; give --prompt TEXT, or --prompt - to read standard input")
    from ee_tuning.generation.command import generate

    generate(config, args.prompt, as_json=args.json, show_exits=args.show_exits)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "generate")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to go on from; repeatable; - reads standard input")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")


COMMANDS = (
    Command(name="generate", summary="complete prompts, leaving the network early where an exit is confident enough",
            examples="""\
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt "Once upon a time" --threshold 0.8 --show-exits
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt - --json < prompt.txt
  ee-tuning generate job.yaml --policy fixed --exit-layer 16 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9""",
            add_arguments=_add_generate, run=generate),
)
