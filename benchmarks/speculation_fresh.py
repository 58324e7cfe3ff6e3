"""Speculation without stored records: a new process decodes five prompts at full depth and by speculation, in turn.

    make demo
    python benchmarks/speculation_fresh.py --model examples/tiny-python-llama --exits runs/demo/exit_heads

Prints the ratio of the times of all prompts, for each process and in the median, with drafts of exits and of repeated
text, of exits alone, and for the share of drafts that was right. The records of a process are removed before the next
one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ee_tuning import EarlyExitLLM

PROMPTS = {
    "code": (
        "import os\nimport sys\n\ndef main(",
        "class Stack:\n    def __init__(self",
        "def read_file(path):\n    ",
        "    for line in lines:\n",
        "try:\n    import json\nexcept ImportError:\n",
    ),
    "text": (
        "The capital of France is",
        "Once upon a time",
        "To make a cake you need",
        "The theory of relativity",
        "def fibonacci(n):",
    ),
}


def main() -> None:
    """Measures and prints, or, with --once, decodes in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--exits", required=True)
    parser.add_argument("--prompts", choices=list(PROMPTS), default="code")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--exits-alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(decode(options)))
        return
    with tempfile.TemporaryDirectory() as cache:
        for alone in (False, True):
            found = [run(options, Path(cache), alone) for _ in range(options.processes)]
            ratios, same = [each["ratio"] for each in found], all(each["same"] for each in found)
            print(
                f"{'exits alone' if alone else 'exits and repeated text'}: {statistics.median(ratios):.2f} "
                f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); {found[0]['accepted']} of {found[0]['drafted']} drafts "
                f"right; {'the very tokens' if same else 'NOT the tokens'} of full depth",
                flush=True,
            )


def run(options: argparse.Namespace, cache: Path, alone: bool) -> dict[str, float]:
    """Runs one new process."""
    shutil.rmtree(cache / "speculation", ignore_errors=True)
    given = [*sys.argv[1:], "--once", *(["--exits-alone"] if alone else [])]
    environment = {**os.environ, "EE_TUNING_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, __file__, *given], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return figures


def decode(options: argparse.Namespace) -> dict[str, float]:
    """Decodes the five prompts in this process, under both policies."""
    torch.set_num_threads(options.threads)
    llm = EarlyExitLLM.load(options.model, options.exits)
    llm.generate(["x"], policy="full", max_new_tokens=8)
    seconds, same, drafted, accepted = {"full": 0.0, "speculative": 0.0}, True, 0, 0
    for prompt in PROMPTS[options.prompts]:
        said = {}
        for policy in seconds:
            keys = {"prompt_lookup": False} if policy == "speculative" and options.exits_alone else {}
            began = time.perf_counter()
            (said[policy],) = llm.generate(
                [prompt],
                policy=policy,
                max_new_tokens=options.new_tokens,
                ignore_eos=True,
                reuse_prefixes=False,
                **keys,
            )
            seconds[policy] += time.perf_counter() - began
        same &= said["full"].token_ids == said["speculative"].token_ids
        drafted += said["speculative"].statistics.num_drafted
        accepted += said["speculative"].statistics.num_accepted
    return {
        "ratio": seconds["full"] / seconds["speculative"],
        "same": same,
        "drafted": drafted,
        "accepted": accepted,
    }


if __name__ == "__main__":
    main()
