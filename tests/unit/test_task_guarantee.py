"""`calibrate --guarantee --task`: the loss is what a task's score drops by, and nothing behind the first failure is
decoded.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.calibration import task_losses
from ee_tuning.calibration.guarantee import prove
from ee_tuning.calibration.task_losses import GRID, Scored, try_on_task
from ee_tuning.evaluation.text_metrics import contains


class Stub:
    """Prompts whose score falls below the threshold of their own; what was decoded is noted."""

    def __init__(self) -> None:
        self.llm, self.tried = None, list[float]()

    def by(self, point: Any) -> list[Scored]:
        self.tried.append(point)
        return [Scored(1.0 if point >= item / 200 else 0.0, 10 * point) for item in range(200)]


def test_the_sequence_ends_at_its_first_failure(monkeypatch: pytest.MonkeyPatch):
    """Hours of decoding at thresholds that no test will look at; a gain on one prompt that pays for the loss of
    another.
    """
    monkeypatch.setattr(task_losses, "points_of", lambda llm, sweep, measure: (None, sweep.thresholds[0]))
    stub, told = Stub(), list[tuple[float, float]]()
    full = [Scored(0.0 if item % 2 else 1.0, 10.0) for item in range(200)]
    scores: Any = stub
    trials = try_on_task(
        scores, full, "max_probability", GRID, 0.2, 0.05, lambda threshold, loss, p: told.append((threshold, loss))
    )
    proof = prove({"max_probability": trials}, 0.2, 0.05, GRID)["max_probability"]
    assert stub.tried == list(GRID[: len(stub.tried)]) and len(stub.tried) == proof.num_proven + 1 < len(GRID)
    # Even items alone can lose; those above 200 x threshold do.
    assert [loss for _, loss in told] == pytest.approx(
        [sum(item / 200 > threshold for item in range(0, 200, 2)) / 200 for threshold in stub.tried]
    )
    assert proof.threshold == GRID[proof.num_proven - 1] and float(proof.p_values[-1]) > 0.05 >= float(
        proof.p_values[-2]
    )
    assert float(proof.losses[proof.num_proven - 1]) < 0.2 and proof.depths.tolist() == pytest.approx(
        [10 * each for each in stub.tried]
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a byte tokenizer, exits/ after layers 2 and 4 of 6, task.jsonl with choices."""
    folder = tmp_path_factory.mktemp("guarantee")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits")
    lines = [
        {"prompt": text, "choices": ["e", "t"], "answer": "e"}
        for text in ("def f", "import os", "x = ", "while ", "class A:", "y")
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def command(shared: Path, tmp_path: Path) -> list[str]:
    return (
        f"calibrate --model {shared / 'model'} --exits {shared / 'exits'} --task {shared / 'task.jsonl'} --output "
        f"{tmp_path / 'calibration.json'} --confidence 0.5 --thresholds 0.05 0.5 --max-new-tokens 8"
    ).split()


@pytest.mark.parametrize("metric", ["contains", "choice"])
def test_the_file_is_what_generate_takes(
    command: list[str], shared: Path, tmp_path: Path, metric: str, capsys: pytest.CaptureFixture[str]
):
    """Losses of another metric; a file that generate does not read; thresholds from the lowest on."""
    assert cli.main([*command, "--guarantee", "0.9", "--metric", metric]) == 0
    told = json.loads((tmp_path / "calibration.json").read_text())
    guarantee = told["guarantee"]
    test = guarantee["tests"]["max_probability"]
    assert guarantee["grid"] == [0.5, 0.05] and guarantee["prompts"] == 6 and len(test["losses"]) >= test["num_proven"]
    assert "guaranteed, leaving from" in capsys.readouterr().out and (tmp_path / "calibration.png").exists()
    if metric == "contains":
        llm = EarlyExitLLM.load(shared / "model", shared / "exits")
        prompts = [json.loads(line)["prompt"] for line in (shared / "task.jsonl").read_text().split("\n") if line]
        full, early = (
            llm.generate(prompts, policy=policy, threshold=0.5, max_new_tokens=8) for policy in ("full", "threshold")
        )
        drops = [max(0.0, contains(a.text, ["e"]) - contains(b.text, ["e"])) for a, b in zip(full, early, strict=True)]
        assert test["losses"][0] == pytest.approx(sum(drops) / 6)
        assert llm.generate(prompts[:1], calibration=str(tmp_path / "calibration.json"), max_new_tokens=3)[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "contains"], "is of --guarantee, and none is given"),
        (["--guarantee", "0.9"], "must be one whose score lies in 0..1"),
        (["--guarantee", "0.01", "--metric", "contains"], "needs at least 69 prompts"),
        (["--guarantee", "0.9", "--metric", "contains", "--thresholds", "1.2"], "must lie in 0..1"),
        (["--guarantee", "0.9", "--metric", "contains", "--data", "x"], "--data does not apply"),
        (["--guarantee", "0.9", "--metric", "contains", "--exits", ""], "needs exits before the last layer"),
        (["--guarantee", "1.5", "--metric", "contains"], "must lie between 0 and 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: list[str], tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    """A guarantee of a metric without bounds; a calibration that fails after all has been decoded."""
    assert cli.main([*command, *arguments]) == 2
    assert re.search(words, capsys.readouterr().err) and list(tmp_path.iterdir()) == []
