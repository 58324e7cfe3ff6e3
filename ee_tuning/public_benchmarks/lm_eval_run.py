"""Runs lm-evaluation-harness under one policy after the other, and adds figures about exits to its results."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.public_benchmarks.driver import Driver
from ee_tuning.sampling.policy import Policy

NOTE = (
    "log-likelihoods are teacher-forced by exit: each token has the distribution of the exit at which its position leaves under the "
    "policy, the first token of an answer, too"
)
KEY = "ee_tuning"
"""The key of these additions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Options of the harness."""

    names: tuple[str, ...]
    include_path: Path | None = None
    """Folder with the user's own tasks."""
    limit: float | None = None
    """Number of documents of each task, or, below 1, a share of them."""
    num_fewshot: int | None = None
    batch_size: int = 32
    applies_chat_template: bool = False
    chat_template: str | None = None
    """A template, or the name of one of the tokenizer's."""
    gen_kwargs: str | None = None
    """key=value,… that override the tasks' own."""
    runs_code: bool = False
    """Whether tasks may run code that the model writes."""


def check_harness(tasks: HarnessTasks) -> None:
    """Raises InputError where the harness is not installed or an option is not possible."""
    if missing := next((name for name in ("lm_eval", "datasets") if find_spec(name) is None), None):
        raise InputError(
            f"--lm-eval needs lm-evaluation-harness, and its package {missing} is not installed; pip install "
            "'ee_tuning[eval]'"
        )
    if tasks.include_path is not None and not tasks.include_path.is_dir():
        raise InputError(f"--include-path must be a folder with tasks (YAML), got {tasks.include_path}")
    if tasks.limit is not None and tasks.limit <= 0:
        raise InputError(f"--limit must be above 0, got {tasks.limit:g}")
    if tasks.num_fewshot is not None and tasks.num_fewshot < 0:
        raise InputError(f"--num-fewshot must be at least 0, got {tasks.num_fewshot}")
    known = _manager(tasks)
    for name in tasks.names:
        if not known.match_tasks([name]):
            raise InputError(
                f"--lm-eval must name tasks, groups or tags of lm-evaluation-harness, got {name!r}; `lm-eval ls tasks` lists "
                "them, --include-path DIR adds your own"
            )


def run_harness(
    driver: Driver, tasks: HarnessTasks, policy: Policy, policy_described: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the harness's results and, under `ee_tuning`, the policy as `policy_described` and where tokens left.

    Raises InputError where a task can not be read, or needs something unsupported.
    """
    from lm_eval.evaluator import simple_evaluate

    from ee_tuning.public_benchmarks.lm_eval_model import EarlyExitLM

    model = EarlyExitLM(driver=driver, given=policy, batch_size=tasks.batch_size, chat_template=tasks.chat_template)
    manager = _manager(tasks)
    try:
        manager.load(list(tasks.names))  # on its own, to distinguish the harness's mistakes from ours
    except Exception as error:  # any exception: missing data sets, invalid YAML, functions of a task
        raise InputError(
            f"lm-evaluation-harness can not read {', '.join(tasks.names)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    results = simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        task_manager=manager,
        num_fewshot=tasks.num_fewshot,
        batch_size=model.batch_size,
        limit=tasks.limit if tasks.limit is None or tasks.limit < 1 else int(tasks.limit),
        log_samples=False,
        apply_chat_template=tasks.applies_chat_template,
        gen_kwargs=tasks.gen_kwargs,
        confirm_run_unsafe_code=tasks.runs_code,
    )
    assert results is not None
    results["config"]["model"] = "ee-tuning"
    return {
        **results,
        KEY: {"policy": dict(policy_described), "note": NOTE, "left": _left(model.left, driver.llm.num_layers)},
    }


def results_json(results: Mapping[str, Any]) -> str:
    """Returns the results in the harness's format."""
    from lm_eval.utils import handle_non_serializable

    return to_json(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def results_table(results: Mapping[str, Any]) -> str:
    """Returns the harness's tables of the results, groups below."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))


def _left(left: Mapping[str, Mapping[int, int]], num_layers: int) -> dict[str, Any]:
    """Returns, per kind of request, the number of tokens, their mean depth in layers, and the share that left at each
    exit.
    """
    figures = {}
    for kind, counts in left.items():
        if total := sum(counts.values()):
            figures[kind] = {
                "tokens": total,
                "mean_depth": sum(layer * count for layer, count in counts.items()) / total,
                "num_layers": num_layers,
                "share_by_exit": {str(layer): counts[layer] / total for layer in sorted(counts)},
            }
    return figures


@functools.lru_cache(maxsize=1)
def _manager(tasks: HarnessTasks) -> Any:
    """Returns the harness's task manager, of the user's own tasks only if they suffice: reading all YAML files takes
    seconds.
    """
    from lm_eval.tasks import TaskManager

    # Otherwise it prints lines on each metric whenever a task is read.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    if tasks.include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(tasks.include_path), include_defaults=False)
    return (
        own
        if all(own.match_tasks([name]) for name in tasks.names)
        else TaskManager(include_path=str(tasks.include_path))
    )
