"""All checks that need a GPU, in prepared stages, for a machine that is available for minutes. docs/gpu.md describes
each stage.

    python tools/gpu_check.py 1 --json stage1.json --budget 240
    python tools/gpu_check.py 2 3 --json stages.json --budget 660
    python tools/gpu_check.py 1 2 3 4 5 --json rehearsal.json --budget 600 --tiny --device cpu

Each stage is a list of checks. If a check fails, its traceback is written to OUT and the others continue; a check is
skipped if too little time is left. OUT is written after every check, and the process ends by itself within its budget.
Output of libraries goes to OUT.log. A table comes last. The exit code is 0 if no check failed (a missed goal of speed
is no failure), 1 if one did, 3 if the time was over first.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages, and returns the exit code."""
    options = _options(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: error: --device cuda needs a GPU, and torch sees none; give --device cpu --tiny for a rehearsal",
            file=sys.stderr,
        )
        return 2
    _keep_apart(Path(options.json))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        return run(options.stages, Path(options.json), options.budget, device, Path(scratch), is_tiny=options.tiny)


def run(
    numbers: list[int], out: Path, budget: float, device: str, scratch: Path, *, is_tiny: bool, is_inline: bool = False
) -> int:
    """Runs the stages `numbers`, and returns the exit code."""
    from gpu_stages import decoding, layers, right, shared_gpu, tuning
    from gpu_stages.bench import Bench
    from gpu_stages.checks import Check, run_checks
    from gpu_stages.deadline import Deadline
    from gpu_stages.report import Report, facts_of

    stages: dict[int, Sequence[Check]] = {
        1: right.CHECKS,
        2: decoding.CHECKS,
        3: tuning.CHECKS,
        4: shared_gpu.CHECKS,
        5: layers.CHECKS,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("EE_TUNING_CACHE", str(scratch / "cache"))
    bench = Bench(device, scratch, out.parent, is_tiny=is_tiny, is_inline=is_inline)
    report = Report(out, facts_of(bench.device, numbers, is_tiny))

    terminal = sys.stdout  # stdout is the log while a check runs

    def at_end(stack: str) -> None:
        report.cut_off(stack)
        report.write()
        print(report.table(), file=terminal, flush=True)

    deadline = Deadline(budget, at_end)
    try:
        run_checks(
            {number: stages[number] for number in numbers},
            bench,
            report.outcomes,
            seconds_left=lambda: deadline.seconds_left,
            changed=report.write,
        )
    finally:
        report.write()
        print(report.table(), file=terminal, flush=True)
        bench.close()
        deadline.reached_in_time()
    return 1 if report.has_failed else 0


def _keep_apart(out: Path) -> None:
    """Redirects the output of libraries and child processes to OUT.log. sys.stdout is still the former output, for the
    checks' lines.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with out.with_name(out.name + ".log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        metavar="STAGE",
        type=int,
        nargs="+",
        choices=range(1, 6),
        help="1: it runs and is right; 2: decoding; 3: tuning; 4: two processes on one GPU; 5: layers of larger models",
    )
    parser.add_argument("--json", metavar="OUT", required=True, help="the record; profiles are put beside it")
    parser.add_argument("--budget", metavar="SECONDS", type=float, required=True)
    parser.add_argument(
        "--tiny", action="store_true", help="shapes that a CPU runs in seconds; every check, whatever the time"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
