"""Commands that decode."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, add_profile, job_of
from ee_tuning.errors import InputError


def generate(args: argparse.Namespace) -> int:
    """Completes prompts."""
    config = job_of(args)
    if not args.prompt and not args.prompts:
        raise InputError(
            "generate needs a prompt, got none; give --prompt TEXT, --prompt - to read standard input, or --prompts FILE"
        )
    if args.overwrite and args.output is None:
        raise InputError("--overwrite is of --output FILE, and none is given; leave it out")
    from ee_tuning.generation.command import generate

    return generate(
        config,
        args.prompt or [],
        prompts_file=args.prompts,
        output=args.output,
        overwrite=args.overwrite,
        as_json=args.json,
        show_exits=args.show_exits,
        profile=args.profile,
    )


def regenerate(args: argparse.Namespace) -> None:
    """Writes data with the model's own answers to prompts."""
    config = job_of(args, "regenerate")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be a number of prompts of at least 1, got {args.limit}")
    from ee_tuning.generation.regenerate import Wish, regenerate

    regenerate(
        config,
        Wish(
            output=args.output,
            overwrites=args.overwrite,
            num_shipped=args.shipped_prompts,
            num_own=args.own_prompts,
            limit=args.limit,
            as_chat=args.as_chat,
            last_turn=args.last_turn,
            drops_cut=args.drop_cut,
        ),
    )


def calibrate(args: argparse.Namespace) -> None:
    """Chooses a threshold for each exit on a text."""
    config = job_of(args)
    from ee_tuning.calibration.calibrate_command import calibrate

    calibrate(config, args)


def chat(args: argparse.Namespace) -> None:
    """Holds a conversation at a terminal."""
    config = job_of(args)
    from ee_tuning.generation.chat import chat

    chat(config, system=args.system, show_exits=args.show_exits)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "generate")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; repeatable; - reads standard input"
    )
    add_profile(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines: {"prompt": TEXT}, with optional keys of the generation section, logit_bias and '
        "structured_output for this prompt, and others, such as id, which are copied to its records",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write a JSON line for each completion to this file. Unfinished output is in FILE.partial, and the same "
        "command continues it",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over, and replace FILE at the end")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by its exit")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "regenerate")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="file for the records. Unfinished output is in FILE.jsonl.partial, and the same command continues it",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over, and replace FILE.jsonl at the end")
    parser.add_argument(
        "--shipped-prompts",
        type=int,
        default=0,
        metavar="N",
        help="answer N of the prompts that come with ee-tuning, before those of --data",
    )
    parser.add_argument(
        "--own-prompts",
        type=int,
        default=0,
        metavar="N",
        help="answer N prompts that the model writes itself, before those of --data: its chat template's beginning of a "
        "user's turn, continued at temperature 1. Those without an end are left out",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer only the first N prompts")
    parser.add_argument(
        "--as-chat",
        action="store_true",
        help="use each text as a user's message in a chat, instead of continuing it",
    )
    parser.add_argument(
        "--last-turn",
        action="store_true",
        help="answer only the last turn of each conversation; earlier answers are kept and not learned",
    )
    parser.add_argument(
        "--drop-cut",
        action="store_true",
        help="leave out answers cut off by --max-new-tokens. By default they are kept and marked, and tune does not learn "
        "their end",
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "calibrate")
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="X",
        help="wanted agreement with the full model among the tokens that leave at an exit (default 0.95)",
    )
    parser.add_argument(
        "--guarantee",
        type=float,
        metavar="DELTA",
        help="instead: the lowest threshold at which, by a statistical test, at most this share of a document's tokens, on "
        "average over documents, differ from the full model's",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="X",
        help="least probability that a calibration keeps its --guarantee (default 0.95)",
    )
    parser.add_argument(
        "--task",
        type=Path,
        metavar="FILE.jsonl",
        help="with --guarantee: the loss of a prompt is the drop of its score below full depth's, on this task in the format "
        "of evaluate; every threshold costs a completion of each prompt",
    )
    parser.add_argument(
        "--metric", choices=("exact", "contains", "rouge-l", "choice"), help="metric of answers to --task"
    )
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="X",
        help="with --task: thresholds to test, from the highest on (default 0.99 0.95 0.9 … 0.05)",
    )
    parser.add_argument(
        "--measure",
        choices=("best", "max_probability", "margin", "entropy"),
        help="measure of confidence; best: the one with which tokens leave earliest (default best; max_probability with --task)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="most tokens to measure on (default 50000; 200000 with --guarantee)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        metavar="FILE",
        help="file for the thresholds, with a picture beside it (default %(default)s)",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "chat")
    parser.add_argument("--system", metavar="TEXT", help="system message before the conversation")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by its exit")


COMMANDS = (
    Command(
        name="calibrate",
        summary="measure, on text, the confidence above which each exit agrees with the full model as often as you want",
        examples="""\
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --data held_out.jsonl --agreement 0.95
  ee-tuning calibrate job.yaml --exits runs/llama-2-7b/exit_heads --measure margin --output runs/llama-2-7b/calibration.json
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --data held_out.jsonl --guarantee 0.05 --confidence 0.95
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --guarantee 0.05 --task qa.jsonl --metric contains

Pass the file to generate and chat with --calibration.
Without --data, the text is what tune holds out of the job's data.paths. An exit that can not reach the agreement is reported and not used.
Every fourth sample is held out, to measure the thresholds on tokens that did not choose them.
Under torchrun, processes beyond tensor parallelism are replicas, which share the text.
--guarantee tests on documents (a text file is one, and so is each line of a .jsonl file) and gives all exits one threshold:
P(expected share of tokens that differ <= DELTA) >= X over the drawn documents. Some hundreds of documents are needed.
--task tests on prompts and their scores: P(expected drop below full depth's <= DELTA) >= X.""",
        add_arguments=_add_calibrate,
        run=calibrate,
    ),
    Command(
        name="generate",
        summary="complete prompts, with early exits where an exit is confident enough",
        examples="""\
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt "Once upon a time" --threshold 0.8 --show-exits
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt - --json < prompt.txt
  ee-tuning generate job.yaml --policy fixed --exit-layer 16 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9
  ee-tuning generate job.yaml --policy speculative --prompts prompts.jsonl --output completions.jsonl

Each completion has a record with its text, tokens and exits, in the order of the prompts. For a prompt that fails, the record holds the
reason, and the exit code is 2. With --output, the same command continues a job that was stopped or killed.
Under torchrun, processes beyond tensor × pipeline are replicas, which share the prompts.""",
        add_arguments=_add_generate,
        run=generate,
    ),
    Command(
        name="regenerate",
        summary="answer prompts with the full model, to train its exits on its own words",
        examples="""\
  ee-tuning regenerate --model Llama-3.1-8B-Instruct --data sharegpt.json --output answers.jsonl --temperature 0.7
  ee-tuning regenerate --model Qwen3-8B --data prompts.jsonl --as-chat --n 4 --temperature 1 --output answers.jsonl
  ee-tuning regenerate --model SmolLM2-135M-Instruct.Q4_1.gguf --shipped-prompts 300 --max-new-tokens 200 --output answers.jsonl
  ee-tuning regenerate --model Qwen3-8B --own-prompts 20000 --output answers.jsonl

It reads the same files as tune, with answers or without. All answers of a conversation are generated anew, each after the new ones before
it; a prompt or a text is continued. Records keep their other keys and their order; `tune --data answers.jsonl` learns only the answers.
A prompt that is too long, or that the chat template refuses, is reported and left out. All layers run, without exits.
Under torchrun, processes beyond tensor × pipeline are replicas, which share the prompts.""",
        add_arguments=_add_regenerate,
        run=regenerate,
    ),
    Command(
        name="chat",
        summary="talk with the model at a terminal, by its chat template",
        examples="""\
  ee-tuning chat --model Llama-2-7b-chat-hf --exits runs/llama-2-7b/exit_heads --threshold 0.8 --show-exits
  ee-tuning chat --model Qwen3-8B --exits runs/qwen3-8b/exit_heads --policy speculative --system 'Answer in one sentence.'""",
        add_arguments=_add_chat,
        run=chat,
    ),
)
