"""Commands that decode."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
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
            limit=args.limit,
            as_chat=args.as_chat,
            last_turn=args.last_turn,
            drops_cut=args.drop_cut,
        ),
    )


def calibrate(args: argparse.Namespace) -> None:
    """Chooses a threshold for each exit on a text."""
    config = job_of(args)
    from ee_tuning.evaluation.calibrate_command import calibrate

    calibrate(config, args)


def chat(args: argparse.Namespace) -> None:
    """Holds a conversation at a terminal."""
    config = job_of(args)
    from ee_tuning.generation.chat import chat

    chat(config, system=args.system, show_exits=args.show_exits)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "generate")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to go on from; repeatable; - reads standard input"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines: {"prompt": TEXT}, keys of the generation section for this prompt alone, and any others, such as '
        "id, which its record keeps",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write a JSON line for each completion there. Until all are made "
        "they are in FILE.partial, from which the same command, given again, goes on",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew, and replace FILE at the end")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "regenerate")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="where the records go. Until all are made they are in FILE.jsonl.partial, from which the same command, given "
        "again, goes on",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew, and replace FILE.jsonl at the end")
    parser.add_argument(
        "--shipped-prompts",
        type=int,
        default=0,
        metavar="N",
        help="answer so many of the prompts that come with ee-tuning, before those of --data",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first so many prompts alone")
    parser.add_argument(
        "--as-chat",
        action="store_true",
        help="take each text as what a user says in a chat, in place of a text to be continued",
    )
    parser.add_argument(
        "--last-turn",
        action="store_true",
        help="answer the last turn of each conversation alone; earlier ones are given, and not learned",
    )
    parser.add_argument(
        "--drop-cut",
        action="store_true",
        help="leave out answers that --max-new-tokens cuts; else they are kept, marked, and tune does not learn that they "
        "end there",
    )


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "calibrate")
    parser.add_argument(
        "--agreement",
        type=float,
        metavar="X",
        help="share of the tokens that leave at an exit which the full model should agree with (default 0.95)",
    )
    parser.add_argument(
        "--guarantee",
        type=float,
        metavar="DELTA",
        help="instead: the lowest threshold by which at most this share of a document's tokens, on average over documents, "
        "differ from the full model's, by a test",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="X",
        help="probability of a calibration to keep its --guarantee, at least (default 0.95)",
    )
    parser.add_argument(
        "--task",
        type=Path,
        metavar="FILE.jsonl",
        help="with --guarantee: the loss of a prompt is by how much its score drops below full depth's, on this task as "
        "evaluate takes it; every threshold costs a completion of each prompt",
    )
    parser.add_argument(
        "--metric", choices=("exact", "contains", "rouge-l", "choice"), help="how answers of --task are judged"
    )
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="X",
        help="with --task: those to test, from the highest on (default 0.99 0.95 0.9 … 0.05)",
    )
    parser.add_argument(
        "--measure",
        choices=("best", "max_probability", "margin", "entropy"),
        help="of confidence; best: the one by which tokens leave earliest (default best; max_probability with --task)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="how many to measure on at most (default 50000; 200000 with --guarantee)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibration.json"),
        metavar="FILE",
        help="where the thresholds go; a picture goes beside it (default %(default)s)",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "chat")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")


COMMANDS = (
    Command(
        name="calibrate",
        summary="measure on text from which confidence on each exit agrees with the full model as often as you want",
        examples="""\
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --data held_out.jsonl --agreement 0.95
  ee-tuning calibrate job.yaml --exits runs/llama-2-7b/exit_heads --measure margin --output runs/llama-2-7b/calibration.json
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --data held_out.jsonl --guarantee 0.05 --confidence 0.95
  ee-tuning calibrate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --guarantee 0.05 --task qa.jsonl --metric contains

generate and chat take the file with --calibration.
Without --data it measures on what tune holds out of the job's data.paths. An exit that can not reach the agreement is told, and not used.
Every fourth sample is held out, and tells what the thresholds do on tokens that they were not chosen by.
With --guarantee documents are drawn and tested (a text file is one, each line of a .jsonl file another), and all exits have one threshold:
P(expected share of tokens that differ <= DELTA) >= X over the draw. Few documents prove little: some hundreds do.
With --task prompts are, by what they lose of their score: P(expected drop below full depth's <= DELTA) >= X.""",
        add_arguments=_add_calibrate,
        run=calibrate,
    ),
    Command(
        name="generate",
        summary="complete prompts, leaving the network early where an exit is confident enough",
        examples="""\
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt "Once upon a time" --threshold 0.8 --show-exits
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt - --json < prompt.txt
  ee-tuning generate job.yaml --policy fixed --exit-layer 16 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9
  ee-tuning generate job.yaml --policy speculative --prompts prompts.jsonl --output completions.jsonl

A record for each completion, in the order of the prompts, tells its text, tokens and exits; one of a prompt that can not be done has the
reason, and the exit code is 2. With --output a job that was stopped or killed goes on when the same command is given again.""",
        add_arguments=_add_generate,
        run=generate,
    ),
    Command(
        name="regenerate",
        summary="answer prompts by the full model: data in its own words, for its exits to learn",
        examples="""\
  ee-tuning regenerate --model Llama-3.1-8B-Instruct --data sharegpt.json --output answers.jsonl --temperature 0.7
  ee-tuning regenerate --model Qwen3-8B --data prompts.jsonl --as-chat --n 4 --temperature 1 --output answers.jsonl
  ee-tuning regenerate --model SmolLM2-135M-Instruct.Q4_1.gguf --shipped-prompts 300 --max-new-tokens 200 --output answers.jsonl

It reads what tune reads, with answers or without. Of a conversation every answer is made anew, in order, each behind those made before;
a prompt, or a text, is continued. The records keep their other keys and their order; `tune --data answers.jsonl` learns the answers alone.
A prompt that is too long, or that the chat template refuses, is told and left out. All layers are run; exits are not asked.""",
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
