"""Commands that measure what exits are worth."""
import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.errors import InputError

NO_THRESHOLDS = "none"


def evaluate(args: argparse.Namespace) -> None:
    """Tasks -> quality and speed of ways to leave early."""
    config = job_of(args, "evaluate")
    for name in ("limit", "block", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    from ee_tuning.evaluation.evaluate_command import Wish, evaluate_tasks

    evaluate_tasks(config, Wish(
        tasks=tuple(args.task or ()), metrics=tuple(args.metric or ()), output=args.output, overwrites=args.overwrite,
        thresholds=_thresholds(args.thresholds), fixed=tuple(args.fixed), speculative=args.speculative,
        calibrations=tuple(args.calibration), limit=args.limit, block=args.block or 0, repeats=args.repeats))


def _thresholds(words: list[str] | None) -> tuple[float, ...]:
    from ee_tuning.evaluation.points import THRESHOLDS

    given = [part for word in words or () for part in word.split(",") if part]
    if words is None:
        return THRESHOLDS
    try:
        return () if given == [NO_THRESHOLDS] else tuple(map(float, given))
    except ValueError as error:
        raise InputError(f"--thresholds must be numbers in 0..1, or {NO_THRESHOLDS}, got {' '.join(words)}") from error


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "evaluate")
    parser.add_argument("--task", action="append", type=Path, metavar="FILE.jsonl",
                        help='JSON lines: {"prompt": TEXT, or "messages": [...], and "answer": TEXT, "answers": [...], or "choices": [...] '
                        'with the right one as "answer"}; max_new_tokens, stop and id hold for their line. Repeatable')
    parser.add_argument("--metric", action="append", choices=("exact", "contains", "rouge-l", "choice", "perplexity"),
                        help="how answers are judged; once for all tasks, or once for each")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER",
                        help="where readings.jsonl, evaluation.json, index.html and the pictures go; the same command, given again, goes "
                        "on")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in the folder of an evaluation")
    parser.add_argument("--thresholds", nargs="+", metavar="X",
                        help="confidences to leave at, each for all exits; none for none (default 1.0 0.9 … 0.2)")
    parser.add_argument("--fixed", nargs="+", type=int, default=[], metavar="LAYER", help="exits at which all tokens leave")
    parser.add_argument("--speculative", action="store_true", help="measure speculation, too: exits draft, the full model checks")
    parser.add_argument("--calibration", action="append", type=Path, default=[], metavar="FILE",
                        help="thresholds that ee-tuning calibrate wrote; repeatable")
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many prompts of each task alone")
    parser.add_argument("--block", type=int, metavar="N",
                        help="prompts that are measured by all ways before they are kept (default 8, or a batch on each replica)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N",
                        help="decode each prompt so many times each way, of which the shortest time counts (default %(default)s)")


COMMANDS = (
    Command(name="evaluate", summary="measure on tasks what leaving early costs in quality and gains in speed",
            examples="""\
  ee-tuning evaluate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --task qa.jsonl --metric contains --output evaluations/qa
  ee-tuning evaluate job.yaml --task qa.jsonl --metric exact --task news.jsonl --metric rouge-l --output evaluations/both
  ee-tuning evaluate job.yaml --task qa.jsonl --metric exact --thresholds 0.9 0.8 --fixed 8 --speculative --output evaluations/ways
  torchrun --nproc-per-node 4 -m ee_tuning evaluate job.yaml --task qa.jsonl --metric exact --output evaluations/qa

Every prompt is decoded at full depth and by each way to leave, in turn, by the likeliest token; figures have 95% intervals over prompts.
exact and contains compare without case, punctuation and articles; rouge-l needs pip install 'ee_tuning[eval]'. Under torchrun, processes
beyond tensor × pipeline are replicas, which share the prompts.""", add_arguments=_add_evaluate, run=evaluate),
)
