"""Commands that decode."""
import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.errors import InputError


def generate(args: argparse.Namespace) -> int:
    """Prompts -> completions."""
    config = job_of(args)
    if not args.prompt and not args.prompts:
        raise InputError("generate needs a prompt, got none; give --prompt TEXT, --prompt - to read standard input, or --prompts FILE")
    if args.overwrite and args.output is None:
        raise InputError("--overwrite is of --output FILE, and none is given; leave it out")
    from ee_tuning.generation.command import generate

    return generate(config, args.prompt or [], prompts_file=args.prompts, output=args.output, overwrite=args.overwrite,
                    as_json=args.json, show_exits=args.show_exits)


def calibrate(args: argparse.Namespace) -> None:
    """Text -> a threshold for each exit."""
    config = job_of(args)
    from ee_tuning.evaluation.calibrate_command import calibrate

    calibrate(config, args)


def chat(args: argparse.Namespace) -> None:
    """A conversation at a terminal."""
    config = job_of(args)
    from ee_tuning.generation.chat import chat

    chat(config, system=args.system, show_exits=args.show_exits)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "generate")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to go on from; repeatable; - reads standard input")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help='JSON lines: {"prompt": TEXT}, keys of the generation section for this prompt alone, and any others, such as '
                        "id, which its record keeps")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a JSON line for each completion there. Until all are made "
                        "they are in FILE.partial, from which the same command, given again, goes on")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, and replace FILE at the end")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "calibrate")
    parser.add_argument("--agreement", type=float, default=0.95, metavar="X",
                        help="share of the tokens that leave at an exit which the full model should agree with (default %(default)s)")
    parser.add_argument("--measure", choices=("best", "max_probability", "margin", "entropy"), default="best",
                        help="of confidence; best: the one by which tokens leave earliest (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=50_000, metavar="N", help="how many to measure on at most (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("calibration.json"), metavar="FILE",
                        help="where the thresholds go; a picture goes beside it (default %(default)s)")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "chat")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")


COMMANDS = (
    Command(name="calibrate", summary="measure on text from which confidence on each exit agrees with the full model as often as you want",
            examples="""\
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --data held_out.jsonl --agreement 0.95
  ee-tuning calibrate job.yaml --exits runs/llama-2-7b/exit_heads --measure margin --output runs/llama-2-7b/calibration.json

generate and chat take the file with --calibration.
Without --data it measures on what tune holds out of the job's data.paths. An exit that can not reach the agreement is told, and not used.
Every fourth sample is held out, and tells what the thresholds do on tokens that they were not chosen by.""",
            add_arguments=_add_calibrate, run=calibrate),
    Command(name="generate", summary="complete prompts, leaving the network early where an exit is confident enough",
            examples="""\
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt "Once upon a time" --threshold 0.8 --show-exits
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt - --json < prompt.txt
  ee-tuning generate job.yaml --policy fixed --exit-layer 16 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9
  ee-tuning generate job.yaml --policy speculative --prompts prompts.jsonl --output completions.jsonl

A record for each completion, in the order of the prompts, tells its text, tokens and exits; one of a prompt that can not be done has the
reason, and the exit code is 2. With --output a job that was stopped or killed goes on when the same command is given again.""",
            add_arguments=_add_generate, run=generate),
    Command(name="chat", summary="talk with the model at a terminal, by its chat template",
            examples="""\
  ee-tuning chat --model Llama-2-7b-chat-hf --exits runs/llama-2-7b/exit_heads --threshold 0.8 --show-exits
  ee-tuning chat --model Qwen3-8B --exits runs/qwen3-8b/exit_heads --policy speculative --system 'Answer in one sentence.'""",
            add_arguments=_add_chat, run=chat),
)
