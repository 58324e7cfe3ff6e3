"""Commands that make a model shallower."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of

_MEASURES = ("angular", "block-influence", "perplexity", "deepest")


def prune(args: argparse.Namespace) -> None:
    """Leaves layers out of a model."""
    config = job_of(args)
    from ee_tuning.pruning.command import PruneOptions, prune

    prune(
        config,
        PruneOptions(
            drop=args.drop,
            measure=args.measure,
            num_samples=args.samples,
            picture=args.picture,
            output=None if args.dry_run else args.output,
            exits_output=args.exits_output,
            model_format=args.format,
            overwrite=args.overwrite,
            as_json=args.json,
        ),
    )


def _add_prune(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "prune")
    parser.add_argument(
        "--drop",
        nargs="+",
        required=True,
        metavar="auto:N|LAYERS",
        help="how many layers to leave out, chosen by --measure, or which ones: 21,22 or 21-24. The first layer and the last one "
        "always stay",
    )
    parser.add_argument(
        "--measure",
        choices=_MEASURES,
        default="angular",
        help="angular: the block of neighbouring layers whose input and output are nearest by angle. block-influence: the layers that "
        "turn states least, neighbours or not. perplexity: the block without which the loss is least. deepest: the deepest but the "
        "last (default %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        metavar="N",
        help="samples of 128 tokens: by the first half layers are chosen, and losses are those of the second (default %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("prune.png"),
        metavar="FILE",
        help="file for the picture (default %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for the pruned model; without it, none")
    parser.add_argument("--dry-run", action="store_true", help="measure and show, and write no model")
    parser.add_argument(
        "--format",
        choices=("hf", "megatron"),
        default="hf",
        help="hf: a plain folder for transformers and engines. megatron: a distributed checkpoint of Megatron-core (default %(default)s)",
    )
    parser.add_argument(
        "--exits-output",
        type=Path,
        metavar="FOLDER",
        help="folder for the exits of --exits, moved with the layers (default --output with -exits at its end)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model of the same format, and exits, that are already there"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


COMMANDS = (
    Command(
        name="prune",
        summary="leave out the layers that a model misses least, with a table of the loss before anything is written",
        examples="""\
  ee-tuning prune --model Llama-2-7b-hf --data held_out.jsonl --drop auto:8
  ee-tuning prune --model Llama-2-7b-hf --data held_out.jsonl --drop auto:8 --output llama-2-7b-24
  ee-tuning prune --model Llama-2-7b-hf --drop 21-28 --exits exits/llama-2-7b --output llama-2-7b-24
  torchrun --nproc-per-node 4 -m ee_tuning prune job.yaml --drop auto:8 --measure perplexity --format megatron --output llama-2-7b-24

One layer is in memory at a time. Without --data, some Python source code is measured. Processes beyond tensor parallelism share the samples.
Exits keep their weights and move with the layers; those behind a dropped layer move to the nearest one below that stays.""",
        add_arguments=_add_prune,
        run=prune,
    ),
)
