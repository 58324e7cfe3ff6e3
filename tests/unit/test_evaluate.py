"""`ee-tuning evaluate`: what is measured, and that nothing of it is lost or mixed with another job's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.errors import InputError
from ee_tuning.evaluation import evaluate_command
from ee_tuning.evaluation.evaluate import Procedure, blocks_of, evaluate
from ee_tuning.evaluation.figures import task_result
from ee_tuning.evaluation.points import FULL_DEPTH, Point, PolicySweep, points_of
from ee_tuning.evaluation.quality import agreement
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.evaluation.task import Task, TaskItem
from ee_tuning.evaluation.text_metrics import contains
from ee_tuning.generation import depth_budget
from ee_tuning.generation.depth_budget import DepthTimes
from ee_tuning.sampling.policy import Policy

LINES: list[dict[str, Any]] = [
    {"prompt": "def f(x):", "answer": "a"},
    {"prompt": "import ", "answer": "os", "max_new_tokens": 3},
    {"messages": [{"role": "user", "content": "hi"}], "answers": ["e", "t"]},
    {"prompt": "x = ", "answer": "1"},
    {"prompt": "while True", "answer": "zz"},
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a byte tokenizer and a chat template, exits/ after layers 2 and 4 of 6, task.jsonl."""
    folder = tmp_path_factory.mktemp("evaluate")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    write_exits(folder / "model", folder / "exits")
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


@pytest.fixture(scope="module")
def llm(shared: Path) -> EarlyExitLLM:
    return EarlyExitLLM.load(shared / "model", shared / "exits", dtype="float64")


def a_task() -> Task:
    return Task(
        name="t",
        metric="contains",
        items=tuple(
            TaskItem(
                where=f"t:{number}",
                id=number,
                prompt=line.get("prompt"),
                messages=tuple(line.get("messages", ())),
                answers=(line["answer"],) if "answer" in line else tuple(line["answers"]),
                max_new_tokens=line.get("max_new_tokens", 12),
            )
            for number, line in enumerate(LINES, 1)
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_readings_are_what_generate_and_the_full_model_say(llm: EarlyExitLLM, batch_size: int):
    """Text of another policy or prompt, agreement with the wrong prefix, a prompt's own limit that is not heeded, chats
    as texts.
    """
    points = points_of(llm, PolicySweep(thresholds=(0.3, 0.05), fixed=(4,), speculative=True))
    assert [point.name for point in points] == [
        "full depth",
        "threshold 0.3",
        "threshold 0.05",
        "exit 4",
        "speculative",
    ]
    task = a_task()
    found = evaluate(llm, [task], points, Procedure(batch_size=batch_size))
    by_key = {(each.item, each.point): each for each in found.readings}
    assert len(found.readings) == len(by_key) == len(LINES) * len(points)
    asked = [line.get("prompt", "user: hi\n") for line in LINES]
    for point in points:
        for place, prompt in enumerate(asked):
            reading, is_chat = by_key[place, point.name], "messages" in LINES[place]
            (said,) = llm.generate(
                [prompt],
                policy=point.policy,
                max_new_tokens=task.items[place].max_new_tokens,
                adds_special_tokens=not is_chat,
            )
            assert (reading.text, reading.exits) == (said.text, said.exit_histogram)
            if not is_chat:
                assert reading.num_agreed == round(agreement(llm, said) * len(said.token_ids))
            assert reading.scores == {"contains": contains(said.text, task.items[place].answers)}
            assert reading.is_same == (said.text == by_key[place, "full depth"].text)
    assert all(by_key[place, "speculative"].is_same for place in range(len(LINES)))
    groups = {each.group for each in found.readings}
    assert len(groups) == -(-len(LINES) // batch_size)


@pytest.mark.slow
def test_full_depth_may_be_another_models(shared: Path, llm: EarlyExitLLM, tmp_path: Path):
    """A pruned model whose agreement is with itself, or the whole model's figures under the pruned one's name."""
    random_llama(
        tmp_path / "small", seed=1, vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END, num_hidden_layers=3
    )
    write_byte_tokenizer(tmp_path / "small")
    (tmp_path / "small" / "chat_template.jinja").write_text((shared / "model" / "chat_template.jinja").read_text())
    small = EarlyExitLLM.load(tmp_path / "small", dtype="float64")
    scored = Task(
        name="p", metric="perplexity", items=(TaskItem(where="p", id=0, prompt="def f", answers=("(x): return x",)),)
    )
    tasks = [a_task(), scored]
    none = PolicySweep(thresholds=())
    both = evaluate(small, tasks, points_of(small, none, own_name="small"), against=llm)
    alone = {name: evaluate(each, tasks, points_of(each, none)) for name, each in (("a", llm), ("b", small))}
    assert both.num_layers == 6
    for number, task in enumerate(both.tasks):
        full, own = task.points
        assert (full.name, own.name, own.mean_depth.value) == ("full depth", "small", 3)
        assert full.metric == alone["a"].tasks[number].points[0].metric
        assert own.metric == alone["b"].tasks[number].points[0].metric
    said = {(each.item, each.point): each for each in both.readings if each.task == "t"}
    for place, line in enumerate(LINES):
        if "messages" not in line:
            own = said[place, "small"]
            (completed,) = small.generate(
                [line["prompt"]], policy="full", max_new_tokens=line.get("max_new_tokens", 12)
            )
            assert own.text == completed.text
            assert own.num_agreed == round(agreement(llm, completed) * len(completed.token_ids))


def test_a_model_of_other_tokens_is_no_measure(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Ids of one vocabulary read as another's."""
    random_llama(tmp_path / "other", vocab_size=VOCABULARY + 1, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(tmp_path / "other", "<|more|>")
    words = f"evaluate --model {shared}/model --task {shared}/task.jsonl --metric contains --thresholds none"
    assert cli.main([*words.split(), "--against", str(tmp_path / "other"), "--output", str(tmp_path / "o")]) == 2
    assert "--against must be a model with the same tokens" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_sampling_is_refused(shared: Path):
    """Agreement and speed of a draw, told as the exits'."""
    llm = EarlyExitLLM.load(shared / "model", shared / "exits")
    for key, value in {"temperature": 0.7, "repetition_penalty": 1.2, "n": 2}.items():
        llm.defaults = type(llm.defaults)(**{key: value})
        with pytest.raises(InputError, match=f"generation.{key} must be"):
            evaluate(llm, [a_task()])


def reading(item: int, point: str, score: float, exits: dict[int, int], seconds: float, **more: Any) -> ItemResult:
    return ItemResult(
        task="t",
        item=item,
        point=point,
        scores={more.get("metric", "exact"): score},
        weight=more.get("weight", 1.0),
        exits=exits,
        num_agreed=sum(exits.values()) - 1,
        is_same=False,
        group=f"0.0.{item}",
        seconds=seconds,
    )


def test_figures_of_readings():
    """Means of ratios in place of ratios of sums, depths of the wrong layers, a speed-up upside down."""
    points = [FULL_DEPTH, Point(name="threshold 0.5", kind="threshold", value=0.5, policy=Policy())]
    items = tuple(TaskItem(where="t", id=i, prompt="x", answers=("y",)) for i in range(2))
    task = Task(name="t", metric="exact", items=items)
    readings = [
        reading(0, "full depth", 1, {8: 10}, 2.0),
        reading(1, "full depth", 1, {8: 30}, 6.0),
        reading(0, "threshold 0.5", 1, {2: 6, 8: 4}, 1.0),
        reading(1, "threshold 0.5", 0, {2: 10}, 1.0),
    ]
    full, early = task_result(task, points, readings).points
    assert full.speedup is not None and (full.speedup.value, full.metric.value, full.relative.value) == (1, 1, 1)
    assert early.speedup is not None and early.time_saved is not None
    assert (early.metric.value, early.relative.value, early.speedup.value, early.time_saved.value) == (
        0.5,
        0.5,
        2.0,
        0.75,
    )
    assert (early.mean_depth.value, early.agreement.value, early.identical.value) == (16 * 2 / 20 + 4 * 8 / 20, 0.9, 0)
    assert {layer: each.value for layer, each in early.exits.items()} == {
        2: 0.8,
        8: 0.2,
    } and early.tokens_per_second == 10


def test_perplexity_is_that_of_all_tokens():
    """The mean of perplexities, which one strange answer makes."""
    task = Task(
        name="t",
        metric="perplexity",
        items=tuple(TaskItem(where="t", id=i, prompt="x", answers=("y",)) for i in range(2)),
    )
    readings = [
        reading(0, "full depth", 0.0, {8: 1}, 1.0, metric="perplexity", weight=1),
        reading(1, "full depth", 9.0, {8: 3}, 1.0, metric="perplexity", weight=3),
    ]
    assert task_result(task, [FULL_DEPTH], readings).full_depth.metric.value == pytest.approx(2.718281828 ** (9 / 4))


def test_blocks_hold_prompts_of_one_task():
    """A block of two tasks; a prompt in none or two."""
    one, other = a_task(), Task(name="u", metric="exact", items=a_task().items[:2])
    assert [(block.number, block.task.name, block.items) for block in blocks_of([one, other], 3)] == [
        (0, "t", range(3)),
        (1, "t", range(3, 5)),
        (2, "u", range(2)),
    ]


@pytest.fixture
def command(shared: Path) -> list[str]:
    return (
        f"evaluate --model {shared / 'model'} --exits {shared / 'exits'} --task {shared / 'task.jsonl'} --metric "
        "contains --thresholds 0.3 0.05 --max-new-tokens 6 --block 2"
    ).split()


def test_the_same_command_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An hour's decoding lost by Ctrl-C; readings measured twice, or of two jobs in one folder; reports of a part."""
    output, told, whole = tmp_path / "out", evaluate_command.EvaluationFolder.keep, list[int]()
    given = [*command, "--output", str(output)]

    def stop(folder: Any, block: int, readings: list[ItemResult]) -> None:
        told(folder, block, readings)
        whole.append(block)
        if len(whole) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_command.EvaluationFolder, "keep", stop)
    assert cli.main(given) == 130
    assert "stopped; 4 of 5 prompts are stored" in capsys.readouterr().err or whole == [0, 1]
    assert [path.name for path in output.iterdir()] == ["readings.jsonl"]
    kept = (output / "readings.jsonl").read_bytes()
    with (output / "readings.jsonl").open("ab") as file:
        file.write(b'{"block": 2, "readings": [{"task"')  # what a kill leaves
    assert cli.main([*given, "--thresholds", "0.3"]) == 2
    assert "differs in threshold 0.05 (leaves from" in capsys.readouterr().err
    assert (
        cli.main([*given, "--max-new-tokens", "7"]) == 2
        and "max_new_tokens (6 there, 7 here)" in capsys.readouterr().err
    )
    assert cli.main(given) == 0
    out, err = capsys.readouterr()
    assert "4 of 5 prompts are in" in err and whole == [0, 1, 2] and "task: contains, 5 prompts" in out
    assert (output / "readings.jsonl").read_bytes().startswith(kept)
    names = {path.name for path in output.iterdir()}
    assert names == {"readings.jsonl", "evaluation.json", "index.html", "quality-task.png", "exits-task.png"}
    figures = json.loads((output / "evaluation.json").read_text())
    assert len(figures["sessions"]) == 2 and figures["settings"]["exits"] and figures["tasks"][0]["num_prompts"] == 5
    assert [point["name"] for point in figures["tasks"][0]["points"]] == [
        "full depth",
        "threshold 0.3",
        "threshold 0.05",
    ]
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page and "threshold 0.05" in page
    before = (output / "readings.jsonl").read_bytes()
    assert cli.main(given) == 0 and "nothing is left to measure" in capsys.readouterr().err
    assert (output / "readings.jsonl").read_bytes() == before
    assert cli.main([*given, "--limit", "1", "--overwrite"]) == 0
    assert json.loads((output / "evaluation.json").read_text())["tasks"][0]["num_prompts"] == 1


def test_a_budget_keeps_its_exit_in_an_evaluation_that_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Times that are measured anew, choose another exit, and make the same command another job."""
    times = [DepthTimes(1.0, {2: 0.3, 4: 0.6}), DepthTimes(1.0, {2: 0.3, 4: 0.4})]
    monkeypatch.setattr(depth_budget, "measure_depths", lambda *_: times.pop(0))
    more = ["--thresholds", "none", "--budget", "0.7", "0.5", "--limit", "1", "--set", "generation.budget=0.9"]
    given = [*command, *more, "--output", str(tmp_path / "out")]
    assert cli.main(given) == 0 and len(times) == 1, "measured once for all"
    assert "budget 0.5: exit 2 of 6 layers, 0.30 of full" in capsys.readouterr().err
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    points = [(point["name"], point["kind"], point["value"]) for point in tree["tasks"][0]["points"][1:]]
    assert points == [("exit 2", "fixed", 2.0), ("exit 4", "fixed", 4.0)]
    assert tree["settings"]["--budget"] == {"0.7": 4, "0.5": 2}
    assert cli.main(given) == 0 and len(times) == 1
    told = capsys.readouterr().err
    assert (
        "budget 0.5: exit 2 of 6 layers, with which the output began" in told and "nothing is left to measure" in told
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-batch-size", "0"], "generation.max_batch_size must be at least 1, got 0"),
        (["--budget", "1.5"], "above 0 and below 1, .* got 1.5"),
        (["--metric", "choice"], '"choices", and this line has only answers'),
        (["--thresholds", "1.5"], "must lie in 0..1, got 1.5"),
        (["--thresholds", "none", "0.4"], "must be numbers in 0..1"),
        (["--fixed", "3"], r"one of the exits \(2, 4\), got 3"),
        (["--exits", ""], "need exits before the last layer, got none; give --exits"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--task", "{}/no.jsonl"], "can not be read"),
        (["--task", "{}/long.jsonl"], "long.jsonl:1: a prompt must be shorter than"),
        (["--task", "{}/bare.jsonl"], 'bare.jsonl:1: a line must have an "answer"'),
        (["--output", "{}/mine"], "holds notes.txt"),
        (["--output", "MODEL/new"], "--output must lie apart from"),
        (["--calibration", "{}/long.jsonl"], "calibrate again"),
        (["--set", "generation.temperature=1"], "evaluate decodes greedily"),
        (["--thresholds", "0.3", "0.3"], "'threshold 0.3' twice"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
):
    """A traceback after hours of decoding; a folder that is left half made; a user's own files taken for an
    evaluation.
    """
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 4000, "answer": "x"}))
    (tmp_path / "bare.jsonl").write_text('{"prompt": "x"}')
    given = [argument.replace("{}", str(tmp_path)).replace("MODEL", command[2]) for argument in arguments]
    if given[0] in ("--task", "--metric"):
        at = command.index(given[0])
        command = [*command[:at], *command[at + 2 :]]
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert cli.main([*command, *([] if "--output" in given else ["--output", str(tmp_path / "out")]), *given]) == 2
    error = capsys.readouterr().err
    assert error.rstrip().split("\n")[-1].startswith("ee-tuning: error") and "Traceback" not in error
    assert re.search(words, error), error
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
