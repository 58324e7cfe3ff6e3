"""lm-evaluation-harness through the server (`local-completions`): the figures that it has in process."""

from pathlib import Path
from typing import Any

import pytest
from harness_tasks import write_subject
from served import Served, served

from ee_tuning.config import load_config
from ee_tuning.public_benchmarks.driver import Driver
from ee_tuning.public_benchmarks.lm_eval_model import EarlyExitLM

for package in ("lm_eval", "fastapi", "tenacity", "aiohttp"):
    pytest.importorskip(package, reason="pip install 'ee_tuning[serve]' 'lm-eval[api]'")

TASKS = ("ours_choice", "ours_text", "ours_rolling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subject(tmp_path_factory.mktemp("harness"))


def figures(model: Any, folder: Path) -> dict[str, float]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    told = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, log_samples=False, num_fewshot=1)
    return {
        f"{task} {name}": value
        for task in TASKS
        for name, value in told["results"][task].items()
        if isinstance(value, float)
    }


def test_the_harness_has_the_same_figures_of_a_served_model(folder, monkeypatch):
    """Another place, another beginning, an echo without the prompt's log-probabilities: figures of nothing."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip about all packages
    keys = {"model.path": str(folder / "model"), "exits.path": str(folder / "exits"), "model.dtype": "float64"}
    server: Served
    with served(load_config(None, {**keys, "generation.policy": "full"})) as server:
        wanted = figures(EarlyExitLM(driver=Driver(server.reference)), folder)
        for tokenized, size in ((True, 3), (False, 1)):
            theirs = LocalCompletionsAPI(
                model="model",
                base_url=f"{server.url}/v1/completions",
                tokenizer=str(folder / "model"),
                tokenizer_backend="huggingface",
                tokenized_requests=tokenized,
                batch_size=size,
                max_length=96,
            )
            assert figures(theirs, folder) == pytest.approx(wanted, rel=1e-6)
        assert len(wanted) >= 6
