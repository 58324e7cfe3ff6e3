"""lm-evaluation-harness on an early-exit model: at full depth it says what its own `hf` model says of the same
folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from harness_tasks import write_subject, write_tasks

from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.json_file import parse_json
from ee_tuning.public_benchmarks.driver import Driver
from ee_tuning.public_benchmarks.lm_eval_run import (
    HarnessTasks,
    check_harness,
    results_json,
    results_table,
    run_harness,
)
from ee_tuning.sampling.policy import FULL, Policy

pytest.importorskip("lm_eval", reason="pip install 'ee_tuning[eval]'")  # brings datasets

TASKS = ("ours_choice", "ours_text", "ours_rolling")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    monkeypatch_module.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    write_subject(folder)
    tokenizer = write_byte_tokenizer(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip about all packages
        yield patch


@pytest.fixture(scope="module")
def llm(folder: Path) -> EarlyExitLLM:
    return EarlyExitLLM.load(folder / "model", folder / "exits", dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=4)


def ours(llm: EarlyExitLLM, folder: Path, policy: Policy = FULL, **wish: Any) -> dict[str, Any]:
    return run_harness(
        Driver(llm),
        HarnessTasks(**{"names": TASKS, "include_path": folder / "tasks", **wish}),
        policy,
        {"name": "mine"},
    )


@pytest.mark.parametrize(
    "wish", [{}, {"num_fewshot": 2, "applies_chat_template": True, "limit": 3}], ids=["plain", "few-shot chat"]
)
def test_full_depth_says_what_the_harness_says_of_transformers(llm, theirs, folder, wish):
    """Another beginning of text, another cut, another stop: figures that can not be compared with anybody's."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    told = ours(llm, folder, **wish)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    wanted = simple_evaluate(
        model=theirs,
        tasks=list(TASKS),
        task_manager=manager,
        log_samples=False,
        limit=wish.get("limit"),
        num_fewshot=wish.get("num_fewshot"),
        apply_chat_template=wish.get("applies_chat_template", False),
    )
    for task in TASKS:
        assert told["results"][task].keys() == wanted["results"][task].keys()
        numbers = {name: value for name, value in wanted["results"][task].items() if isinstance(value, int | float)}
        assert {name: told["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4, nan_ok=True)
    assert told["n-samples"] == wanted["n-samples"] and told["n-shot"] == wanted["n-shot"]


def test_requests_are_answered_as_the_harness_answers_them(llm, theirs):
    """Metrics hide what a sum of log-probabilities would tell: empty contexts, texts longer than the context, spaces at
    its end.
    """
    from lm_eval.api.instance import Instance

    from ee_tuning.public_benchmarks.lm_eval_model import EarlyExitLM

    model = EarlyExitLM(driver=Driver(llm), given=FULL, batch_size=3)
    pairs = [("the quick ", "brown"), ("", "fox"), ("x" * 200, " jumps"), ("a", "b"), ("a", "c")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    told, wanted = (each.loglikelihood(requests, disable_tqdm=True) for each in (model, theirs))
    assert [value for value, _ in told] == pytest.approx([value for value, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in told] == [greedy for _, greedy in wanted]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("short", " ".join(map(str, range(70))))]
    assert model.loglikelihood_rolling(texts, True) == pytest.approx(
        theirs.loglikelihood_rolling(texts, True), rel=1e-4
    )
    keys = {"until": ["e"], "max_gen_toks": 9}
    prompts = [
        Instance("generate_until", {}, pair, 0)
        for pair in (
            ("the quick", keys),
            ("w" * 300, keys),
            ("sampled", {**keys, "do_sample": False, "temperature": 0.0}),
        )
    ]
    assert model.generate_until(prompts, True) == theirs.generate_until(prompts, True)


def test_thresholds_are_told_with_the_results(llm, folder):
    """A table of accuracies that does not say by which exits."""
    told = ours(llm, folder, Policy(thresholds={2: 0.3, 4: 0.3}))
    found = parse_json(results_json(told).encode())["ee_tuning"]
    assert found["policy"] == {"name": "mine"} and "teacher-forced" in found["note"]
    for kind in ("loglikelihood", "generate_until"):
        assert found["left"][kind]["mean_depth"] < 6 and sum(
            found["left"][kind]["share_by_exit"].values()
        ) == pytest.approx(1)
    assert ours(llm, folder)["ee_tuning"]["left"]["loglikelihood"]["mean_depth"] == 6
    assert all(task in results_table(told) for task in TASKS)


def test_what_one_pass_tells_is_kept_for_the_next_policy(llm, folder, monkeypatch):
    """A grid of ten thresholds at ten times the cost; scores of one policy under another's name."""
    from ee_tuning.public_benchmarks import driver as module

    policies = [FULL, Policy(thresholds={2: 0.3, 4: 0.3}), Policy(fixed_exit=2)]
    apart = [ours(llm, folder, policy, names=("ours_choice", "ours_rolling")) for policy in policies]
    passes, real, driver = list[int](), module.score_by, Driver(llm)
    monkeypatch.setattr(module, "score_by", lambda *arguments: passes.append(len(arguments[2])) or real(*arguments))
    driver.expect(policies)
    tasks = HarnessTasks(names=("ours_choice", "ours_rolling"), include_path=folder / "tasks")
    for policy, wanted in zip(policies, apart, strict=True):
        told = run_harness(driver, tasks, policy, {"name": "mine"})
        assert told["ee_tuning"] == wanted["ee_tuning"]
        for task, metrics in wanted["results"].items():
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            assert {name: told["results"][task][name] for name in numbers} == pytest.approx(numbers, nan_ok=True)
    assert passes == [3, 3]


def test_repeated_samples_differ(llm):
    """`repeats` of a task that samples: the same completion five times, a pass@5 that is pass@1."""
    from lm_eval.api.instance import Instance

    from ee_tuning.public_benchmarks.lm_eval_model import EarlyExitLM

    model = EarlyExitLM(driver=Driver(llm), given=FULL)
    request = Instance("generate_until", {}, ("ab", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}), 0)
    assert len(set(model.generate_until([request] * 4, True))) > 1


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"include_path": Path("nowhere")}, "--include-path must be a folder"),
        ({"limit": -1}, "--limit must be above 0"),
        ({"num_fewshot": -1}, "--num-fewshot must be at least 0"),
    ],
)
def test_what_the_harness_can_not_do_is_refused(folder, wish, words):
    """A traceback of a package that the user did not call, after the model was loaded."""
    with pytest.raises(InputError, match=words):
        check_harness(HarnessTasks(**{"names": TASKS, "include_path": folder / "tasks", **wish}))


def test_a_task_that_is_not_there_is_refused(folder, monkeypatch):
    """As above. The harness's own tasks, thousands of files, are left out here."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **keys: TaskManager(**{**keys, "include_defaults": False}))
    with pytest.raises(
        InputError, match="--lm-eval must name tasks, groups or tags of lm-evaluation-harness, got 'no_such_task'"
    ):
        check_harness(HarnessTasks(names=("ours_text", "no_such_task"), include_path=folder / "tasks"))


def test_data_that_are_not_there_are_refused(llm, folder, tmp_path):
    """As above, where the task's YAML names a data set that can not be had."""
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "documents.jsonl").unlink()
    with pytest.raises(InputError, match="lm-evaluation-harness can not read ours_choice"):
        run_harness(Driver(llm), HarnessTasks(names=("ours_choice",), include_path=tmp_path / "tasks"), FULL, {})


def test_keys_of_generation_that_mean_nothing_are_refused(llm):
    """Beam search asked for, greedy decoding reported."""
    from lm_eval.api.instance import Instance

    from ee_tuning.public_benchmarks.lm_eval_model import EarlyExitLM

    model = EarlyExitLM(driver=Driver(llm), given=FULL)
    with pytest.raises(InputError, match="got num_beams"):
        model.generate_until([Instance("generate_until", {}, ("a", {"num_beams": 4}), 0)], True)


def test_the_harness_finds_the_model_by_name(folder):
    """`lm_eval --model ee-tuning --model_args …` that ignores the threshold."""
    from lm_eval.api.registry import get_model

    import ee_tuning.public_benchmarks.lm_eval_model  # noqa: F401

    model = get_model("ee-tuning").create_from_arg_string(
        f"model={folder / 'model'},exits={folder / 'exits'},threshold=0.4,dtype=float32",
        {"batch_size": 7, "device": None, "max_batch_size": None},
    )
    assert model.policy == Policy(thresholds={2: 0.4, 4: 0.4}) and model.batch_size == 7
    assert model.driver.llm.model.plan.dtype == torch.float32
