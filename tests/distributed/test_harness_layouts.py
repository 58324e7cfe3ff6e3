"""One rank runs lm-evaluation-harness, or any other program, and the others follow it, at every layout TP × PP × DP."""

from pathlib import Path
from typing import Any

import pytest
from harness_tasks import write_subject

from ee_tuning.config import ParallelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.public_benchmarks.driver import Driver, drive
from ee_tuning.public_benchmarks.lm_eval_run import HarnessTasks, run_harness
from ee_tuning.sampling.policy import FULL, Policy

POLICIES = {"full": FULL, "threshold": Policy(thresholds={2: 0.3, 4: 0.5})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subject(tmp_path_factory.mktemp("harness"), num_documents=4)


def llm_at(folder: Path, tp: int, pp: int) -> EarlyExitLLM:
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    config = {"model.path": str(folder / "model"), "exits.path": str(folder / "exits"), "model.dtype": "float64"}
    return EarlyExitLLM.from_config(load_config(None, config), topology)


def figures(folder: Path, driver: Driver) -> dict[str, Any]:
    """Policy -> task and metric -> figure, and where tokens left."""
    from unittest.mock import patch

    wish = HarnessTasks(names=("ours_choice", "ours_text", "ours_rolling"), include_path=folder / "tasks")
    found = {}
    driver.expect(list(POLICIES.values()))
    for name, policy in POLICIES.items():
        with (
            patch("datasets.config.HF_DATASETS_CACHE", folder / "cache"),
            patch("lm_eval.evaluator.add_env_info", lambda results: None),
        ):
            told = run_harness(driver, wish, policy, {})
        numbers = {
            f"{task} {metric}": float(f"{value:.7g}")
            for task, metrics in told["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        }
        left = told["ee_tuning"]["left"]
        found[name] = {**numbers, **{kind: left[kind]["share_by_exit"] for kind in ("loglikelihood", "generate_until")}}
    return found


def figures_at(folder: Path, tp: int, pp: int) -> dict[str, Any] | None:
    """What rank 0 has; None on the others, where nothing of the harness runs."""
    llm = llm_at(folder, tp, pp)
    return drive(llm, lambda driver: figures(folder, driver))


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 4), (1, 2)])
def test_layouts_give_the_harness_the_same_figures(world, folder, tp, pp):
    """The harness's own Megatron model refuses pipeline parallelism; ranks that each run the harness need not draw the
    same documents.
    """
    pytest.importorskip("lm_eval")
    wanted = figures(folder, Driver(llm_at(folder, 1, 1)))
    assert len(wanted["threshold"]["loglikelihood"]) == 3 and wanted["full"] != wanted["threshold"]
    assert world.run(figures_at, folder, tp, pp) == [wanted, None, None, None]


def scores_and_failure(folder: Path, failure: str) -> tuple[float, str]:
    """The log-probability that rank 0's program saw before it failed, and what each rank was told."""
    llm, seen = llm_at(folder, 2, 2), []

    def program(driver: Driver) -> None:
        with pytest.raises(InputError):
            driver.score([([1], [])], FULL, 4)  # a refusal that the program lives with
        seen.append(driver.score([([1], [2])], FULL, 4)[0].logprob)
        raise InputError(failure) if failure == "refused" else KeyError(failure)

    try:
        drive(llm, program)
    except Exception as error:
        return sum(seen), f"{type(error).__name__}: {error}"
    raise AssertionError("it must fail")


@pytest.mark.parametrize(
    ("failure", "told", "told_others"),
    [
        ("refused", "InputError: refused", "InputError: refused"),
        ("broken", "KeyError: 'broken'", "RuntimeError: rank 0 failed: KeyError: 'broken'"),
    ],
)
def test_a_program_that_fails_ends_all_ranks(world, folder, failure, told, told_others):
    """Ranks that wait for a rank 0 that is gone, until a time-out half an hour later."""
    (logprob, first), *others = world.run(scores_and_failure, folder, failure)
    assert logprob < 0 and first == told
    assert others == [(0, told_others)] * 3
