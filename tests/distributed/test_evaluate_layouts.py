"""An evaluation finds the same at every layout, replicas included, and one rank reads and writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning.config import ParallelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.evaluation import evaluate_command as module
from ee_tuning.evaluation.evaluate_command import EvaluateOptions, evaluate_tasks
from ee_tuning.evaluation.points import PolicySweep
from ee_tuning.generation.replicas import over_replicas
from ee_tuning.parallel.topology import init_parallel

LINES = [
    {"prompt": text, "choices": ["e", "or", "x = 1"], "answer": "e"}
    for text in ("def f", "import os", "x = ", "while ", "class A:")
]


def evaluate_at(folder: str, task: str, output: str, keys: dict[str, Any]) -> str:
    """What the command ends with: nothing, or its error."""
    module.destroy_parallel = lambda: None  # type: ignore[assignment]  # the world goes on
    config = load_config(
        None,
        {
            "model.path": f"{folder}/model",
            "exits.path": f"{folder}/exits",
            "model.dtype": "float64",
            "generation.max_new_tokens": 7,
            "generation.max_batch_size": 1,
            **keys,
        },
    )
    try:
        evaluate_tasks(
            config,
            EvaluateOptions(
                tasks=(Path(task), Path(task).with_name("choice.jsonl")),
                metrics=("contains", "choice"),
                output=Path(output),
                sweep=PolicySweep(thresholds=(0.05,), fixed=(2,), speculative=True),
            ),
        )
    except InputError as error:
        return str(error)
    return ""


def readings_in(folder: Path) -> list[dict[str, Any]]:
    """Sorted, without what time tells."""
    blocks = [json.loads(line) for line in (folder / "readings.jsonl").read_text().split("\n") if line]
    found = [
        {key: value for key, value in each.items() if key not in ("seconds", "group")}
        for block in blocks
        if "block" in block
        for each in block["readings"]
    ]
    return sorted(found, key=lambda each: (each["task"], each["item"], each["point"]))


def test_layouts_find_the_same(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replicas that measure the same prompts, or lose some; results in another order; a file that four ranks write;
    ranks that wait for ever where one prompt is refused.
    """
    monkeypatch.setattr(module, "destroy_parallel", module.destroy_parallel)
    random_llama(tmp_path / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(tmp_path / "model")
    write_exits(tmp_path / "model", tmp_path / "exits")
    task, bad = tmp_path / "task.jsonl", tmp_path / "bad.jsonl"
    for path in (task, tmp_path / "choice.jsonl"):
        path.write_text("\n".join(map(json.dumps, LINES)))
    bad.write_text('{"prompt": "x"}')
    assert evaluate_at(str(tmp_path), str(task), str(tmp_path / "one"), {}) == ""
    keys = {"parallel.pipeline_model_parallel_size": 2}
    assert world.run(evaluate_at, str(tmp_path), str(task), str(tmp_path / "four"), keys) == [""] * 4
    found = readings_in(tmp_path / "four")
    assert found == readings_in(tmp_path / "one") and len(found) == 2 * 4 * len(LINES)
    assert (
        json.loads((tmp_path / "four" / "evaluation.json").read_text())["settings"]["tensor × pipeline × data"]
        == "1 × 2 × 2"
    )
    assert len(set(world.run(evaluate_at, str(tmp_path), str(bad), str(tmp_path / "bad"), keys))) == 1
    assert world.run(shared_out) == [[10, 11, 12, 13, 14, 15, 16]] * 4
    assert {text.partition(":")[0] for text in world.run(refused_by_one)} == {"three is refused"}


def shared_out() -> list[int]:
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=2))
    return over_replicas(range(7), lambda share: [10 + each for each in share], topology)


def refused_by_one() -> str:
    topology = init_parallel(ParallelSection())

    def refuse(share: list[int]) -> list[int]:
        if 3 in share:
            raise InputError("three is refused")
        return share

    try:
        over_replicas(range(3 + 4), refuse, topology)
    except InputError as error:
        return str(error)
    return ""
