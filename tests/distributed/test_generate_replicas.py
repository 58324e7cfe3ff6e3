"""Replicas share the prompts of `generate` and the text of `calibrate`, and what comes of them is one process's."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning.calibration import calibrate_command
from ee_tuning.calibration.calibrate_command import calibrate
from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.generation import command
from ee_tuning.generation.command import generate
from ee_tuning.generation.completion import StreamedToken
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.output_file import OutputFile

LINES: list[dict[str, Any]] = [
    {"prompt": "def f", "id": "a", "n": 2},
    {"prompt": "import os" * 9, "max_new_tokens": 25},
    {"prompt": "x", "policy": "nothing"},
    {"prompt": "w" * 300, "id": "too long"},
    *({"prompt": "while " + "x" * length, "seed": length} for length in range(6)),
]
LAYOUTS = {
    "four replicas": {},
    "tensor 2, two replicas": {"parallel.tensor_model_parallel_size": 2},
    "two stages, two replicas": {"parallel.pipeline_model_parallel_size": 2},
}


class Killed(Exception):
    """Stands for what ends a process."""


def generate_at(folder: str, output: str, keys: dict[str, Any], kept: int | None = None) -> tuple[str, int]:
    """What the command ends with, and how many tokens this process made. The process of rank 0 is ended once `kept`
    completions are in the output.
    """
    command.destroy_parallel = lambda: None  # type: ignore[assignment]  # the world goes on
    config = load_config(
        None,
        {
            "model.path": f"{folder}/model",
            "exits.path": f"{folder}/exits",
            "model.dtype": "float64",
            "generation.max_new_tokens": 9,
            "generation.max_batch_size": 2,
            "generation.temperature": 0.8,
            "generation.threshold": 0.02,
            **keys,
        },
    )
    write, run, num_tokens = OutputFile.write, EarlyExitLLM.run, 0

    def write_or_end(file: OutputFile, record: dict[str, Any]) -> None:
        if len(file.done) == kept:
            raise Killed
        write(file, record)

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal num_tokens
        for token in run(*args, **options):
            assert isinstance(token, StreamedToken)
            num_tokens += 1
            yield token

    OutputFile.write, EarlyExitLLM.run = write_or_end, counted  # type: ignore[method-assign]
    try:
        code = generate(config, [], prompts_file=Path(folder) / "prompts.jsonl", output=Path(output))
        return f"exit code {code}", num_tokens
    except (InputError, RuntimeError, Killed) as error:
        return f"{type(error).__name__}: {error}", num_tokens
    finally:
        OutputFile.write, EarlyExitLLM.run = write, run  # type: ignore[method-assign]


def records_in(file: Path) -> list[dict[str, Any]]:
    """Without what time tells."""
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    for record in found:
        record.pop("tokens_per_second", None)
        statistics = record.get("statistics", {})
        record["statistics"] = {key: value for key, value in statistics.items() if key == "exit_histogram"}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    generate_at(str(folder), str(folder / "one.jsonl"), {})
    return folder


@pytest.fixture(autouse=True)
def _world_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, calibrate_command):
        monkeypatch.setattr(module, "destroy_parallel", module.destroy_parallel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicas_complete_what_one_process_completes(world: Any, folder: Path, layout: str):
    """Records that a replica keeps to itself, in another order, or twice; an error of one replica's prompt that others
    do not count; all the work on one replica.
    """
    output = folder / f"{layout}.jsonl"
    ends = world.run(generate_at, str(folder), str(output), LAYOUTS[layout])
    assert {end for end, _ in ends} == {"exit code 2"}  # two prompts can not be done
    made, wanted = records_in(output), records_in(folder / "one.jsonl")
    assert made == wanted and len(made) == 2 + 1 + 1 + 1 + 6
    all_tokens = sum(len(record.get("token_ids", ())) for record in made)
    assert max(num_tokens for _, num_tokens in ends) < 0.8 * all_tokens


def test_a_killed_job_goes_on(world: Any, folder: Path):
    """A completion that is made twice, or lost, when a process is killed; ranks that wait for a dead one for ever."""
    output = folder / "killed.jsonl"
    ends = [end for end, _ in world.run(generate_at, str(folder), str(output), {}, 3)]
    assert ends == ["Killed: ", *["RuntimeError: rank 0 failed: Killed: "] * 3]
    assert not output.exists()
    kept = records_in(Path(f"{output}.partial"))[1:]
    assert len(kept) == 3
    num_made = sum(num_tokens for _, num_tokens in world.run(generate_at, str(folder), str(output), {}))
    made = records_in(output)
    assert made == records_in(folder / "one.jsonl")
    num_tokens = {(each["prompt_index"], each["index"]): len(each["token_ids"]) for each in made if "index" in each}
    known = {(each["prompt_index"], each["index"]) for each in kept}
    left = [
        key
        for key in num_tokens
        if not {(key[0], index) for index in range(2) if (key[0], index) in num_tokens} <= known
    ]
    assert num_made == sum(num_tokens[key] for key in left)


def calibrate_at(folder: str, output: str, keys: dict[str, Any], flags: dict[str, Any]) -> str:
    """What the command ends with: nothing, or its error."""
    calibrate_command.destroy_parallel = lambda: None  # type: ignore[assignment]
    config = load_config(
        None,
        {
            "model.path": f"{folder}/model",
            "exits.path": f"{folder}/exits",
            "model.dtype": "float64",
            "data.valid_paths": [f"{folder}/held_out.jsonl"],
            **keys,
        },
    )
    given = dict.fromkeys(("task", "metric", "thresholds", "guarantee", "agreement", "confidence", "measure", "tokens"))
    try:
        calibrate(config, argparse.Namespace(output=Path(output), overrides={}, **{**given, **flags}))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "flags", [{"agreement": 0.05}, {"guarantee": 0.9, "confidence": 0.5}], ids=["agreement", "guarantee"]
)
def test_replicas_calibrate_as_one_process(world: Any, folder: Path, flags: dict[str, Any]):
    """Text that some replica does not read, or reads twice; thresholds that depend on how many replicas there are."""
    texts = [{"text": "".join(chr(97 + (7 * i + j * j) % 26) for j in range(80 + 10 * i))} for i in range(30)]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    name = next(iter(flags))
    assert calibrate_at(str(folder), str(folder / f"one_{name}.json"), {}, flags) == ""
    for layout in ({}, {"parallel.tensor_model_parallel_size": 2}):
        assert world.run(calibrate_at, str(folder), str(folder / f"four_{name}.json"), layout, flags) == [""] * 4
        found, wanted = (json.loads((folder / f"{who}_{name}.json").read_text()) for who in ("four", "one"))
        if layout:  # sums of shards differ in their last bits
            assert found["thresholds"].keys() == wanted["thresholds"].keys() and found["tokens"] == wanted["tokens"]
        else:
            assert found == wanted
    refused = world.run(
        calibrate_at, str(folder), str(folder / "no.json"), {"parallel.pipeline_model_parallel_size": 2}, flags
    )
    assert len(set(refused)) == 1 and "without pipeline stages, got pipeline 2" in refused[0]
