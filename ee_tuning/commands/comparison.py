"""The command that compares ways to a faster model."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.errors import InputError


def compare(args: argparse.Namespace) -> int:
    """Makes and measures several ways to a faster model."""
    config = job_of(args, "compare")
    from ee_tuning.comparison.command import compare
    from ee_tuning.comparison.job import THRESHOLDS, CompareOptions

    ways = _ways(args.ways)
    return compare(
        config,
        CompareOptions(
            output=args.output,
            tokens=args.tokens,
            ways=ways,
            depths=_numbers("--depth", args.depth),
            rates=_rates(args.lr, ways),
            trainable=args.trainable,
            measure=args.drop_measure,
            thresholds=THRESHOLDS if args.thresholds is None else _numbers("--thresholds", args.thresholds),
            tasks=tuple(args.task or ()),
            metrics=tuple(args.metric or ()),
            num_samples=args.samples,
            num_prompts=args.prompts,
            repeats=args.repeats,
            num_processes=args.nproc,
            dry_run=args.dry_run,
            as_json=args.json,
        ),
    )


def _words(given: list[str]) -> list[str]:
    return [part.strip() for word in given for part in word.split(",") if part.strip()]


def _ways(given: list[str] | None) -> tuple[str, ...]:
    from ee_tuning.comparison.ways import DEFAULT_WAYS, WAYS

    asked = DEFAULT_WAYS if given is None else tuple(dict.fromkeys(_words(given)))
    wrong = [way for way in asked if way not in WAYS]
    if wrong or not asked:
        raise InputError(f"--ways must be some of {', '.join(WAYS)}, got {', '.join(wrong) or 'none'}")
    return asked


def _numbers(flag: str, given: list[str] | None) -> tuple[float, ...]:
    words = _words(given or [])
    try:
        found = tuple(map(float, words))
    except ValueError as error:
        raise InputError(f"{flag} must be numbers, got {' '.join(words)}; for example {flag} 0.75 0.5") from error
    if given is not None and not found:
        raise InputError(f"{flag} must be numbers, got none; leave it out for the default")
    return found


def _rates(given: list[str] | None, ways: tuple[str, ...]) -> dict[str, float]:
    """Parses 1e-3, for all ways, or healed-kl=3e-3 for one."""
    from ee_tuning.comparison.ways import WAYS

    rates: dict[str, float] = {}
    for word in _words(given or []):
        way, equals, number = word.rpartition("=")
        if equals and way not in WAYS:
            raise InputError(f"--lr names {way!r}, which is no way; they are {', '.join(WAYS)}")
        try:
            rate = float(number)
        except ValueError as error:
            raise InputError(
                f"--lr takes a number, or WAY=NUMBER, got {word!r}; for example --lr exits=1e-3"
            ) from error
        if not (tuned := [each for each in ways if WAYS[each].rate is not None and way in ("", each)]):
            raise InputError(
                f"--lr must be of a way that is tuned, and {word} is of none in --ways {','.join(ways)}; leave it out, or "
                "add the way"
            )
        rates |= dict.fromkeys(tuned, rate)
    return rates


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "compare")
    parser.add_argument(
        "--tokens",
        type=int,
        required=True,
        metavar="N",
        help="tokens that each tuned model reads; whole steps of --global-batch-size × --seq-length are taken",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for every step's result, compare.json, index.html and the pictures; the same command goes on in it, and with "
        "more --ways adds them",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="exits, tied, fitted, pruned, healed-ce, healed-kl, sorted, deepest, deepest-kl (default all but the last two)",
    )
    parser.add_argument(
        "--depth",
        nargs="+",
        metavar="SHARE",
        help="shares of the layers to compare at (default 0.75 0.5); or name layers by --exit-layers",
    )
    parser.add_argument(
        "--lr",
        nargs="+",
        metavar="X|WAY=X",
        help="learning rate of all tuned ways, or of one (default 1e-3; of sorted 3e-4)",
    )
    parser.add_argument(
        "--trainable",
        default="lora",
        metavar="KIND",
        help="what healing trains: lora, mlp, last:K, half, backbone or all (default %(default)s)",
    )
    parser.add_argument(
        "--drop-measure",
        choices=("angular", "block-influence", "perplexity", "deepest"),
        default="angular",
        help="how layers are chosen to be left out, as --measure of prune (default %(default)s)",
    )
    _add_measuring(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes of each step, which torchrun starts on this machine (default tensor × pipeline)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the steps and what they take, and do nothing")
    parser.add_argument("--json", action="store_true", help="print compare.json instead of the table")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thresholds", nargs="+", metavar="X", help="thresholds of the exits to measure (default 0.9 0.8 0.6)"
    )
    parser.add_argument(
        "--task",
        action="append",
        type=Path,
        metavar="FILE.jsonl",
        help="a task of evaluate to measure, too; repeatable",
    )
    parser.add_argument(
        "--metric",
        action="append",
        choices=("exact", "contains", "rouge-l", "choice", "perplexity"),
        help="metric of tasks; once for all, or once for each",
    )
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="held-out samples of the loss (default %(default)s)"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=12,
        metavar="N",
        help="held-out prompts that are continued by --max-new-tokens, for the speed (default %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        metavar="N",
        help="continue each prompt N times; the shortest time counts (default %(default)s)",
    )


COMMANDS = (
    Command(
        name="compare",
        summary="compare ways to a faster model: exits, pruning, healing, each tuned on the same tokens and measured alike",
        examples="""\
  ee-tuning compare --model Llama-2-7b-hf --data corpus.jsonl --tokens 20000000 --output comparisons/llama-2-7b
  ee-tuning compare --model Llama-2-7b-hf --data corpus.jsonl --tokens 20000000 --output comparisons/llama-2-7b --dry-run
  ee-tuning compare --model SmolLM2-135M --data text.txt --tokens 200000 --depth 0.5 --ways exits pruned healed-kl --output comparisons/small
  ee-tuning compare job.yaml --tokens 20000000 --task qa.jsonl --metric contains --lr exits=3e-4 healed-kl=1e-4 --output comparisons/qa
  ee-tuning compare job.yaml --tokens 20000000 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --output comparisons/big

Every step is a command that is printed and could be typed: convert, tune, prune, export, evaluate. A finished step is not repeated, and
the same command goes on. All rows have the same held-out text and settings; speeds are ratios to the whole model in the same run.
The exit code is 1 where a way failed: its reason stands beneath the table, and the others are measured.""",
        add_arguments=_add_compare,
        run=compare,
    ),
)
