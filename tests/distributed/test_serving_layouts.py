"""Under torchrun rank 0 serves, and the other ranks decode with it: the answers are those of one process."""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, config_of, served

from ee_tuning import EarlyExitLLM, SamplingParams
from ee_tuning.config import Config
from ee_tuning.generation.completion_runner import CompletionRunner
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.serving.settings import ServeSettings

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")

BODIES: tuple[dict[str, Any], ...] = (
    {"prompt": "def main(", "policy": "full", "seed": 1},
    {"prompt": "class A", "exit_threshold": 0.4, "seed": 2},
    {"prompt": "x = ", "exit_layer": 4, "seed": 3, "stop": "e"},
    {"prompt": "import ", "policy": "speculative", "seed": 4},
    {"prompt": "y" * 2000},  # refused
    {"prompt": "def f(", "echo": True, "logprobs": 1, "policy": "full", "seed": 5},
    {"prompt": "def g(a, b", "echo": True, "logprobs": 1, "exit_threshold": 0.4, "max_tokens": 0},
)
SIZES = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}


def answers_of_rank(exits: str, folder: str) -> list[Any]:
    """What clients of rank 0 get; on the other ranks nothing, once rank 0 stops them."""
    from ee_tuning.serving.command import make_engine
    from ee_tuning.serving.engine_loop import EngineLoop

    config = config_of(Path(exits), Path(folder), **SIZES)
    topology = init_parallel(config.parallel)
    if topology.rank:
        llm = EarlyExitLLM.from_config(config, topology)
        EngineLoop(
            CompletionRunner(make_engine(llm, ServeSettings(), topology), llm.decode, llm.special), topology
        ).run()
        return []
    with served(config, topology) as server:
        return _ask_all(server.url)


def _ask_all(url: str) -> list[Any]:
    made: list[Any] = [""] * len(BODIES)

    def ask(place: int) -> None:
        body = json.dumps({"max_tokens": 16, "temperature": 0.9, **BODIES[place]}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                choice = json.load(answer)["choices"][0]
                made[place] = choice["logprobs"]["token_logprobs"][1:] if "echo" in BODIES[place] else choice["text"]
        except urllib.error.HTTPError as error:
            made[place] = str(error.code)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(BODIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_all_ranks_decode_what_rank_0_is_asked(world: Any, tmp_path: Path):
    """Ranks that hear of a request in another order, or not at all, and wait for ever; a refusal on one rank alone."""
    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4, 8], init="copy")
    first, *others = world.run(answers_of_rank, str(exits), str(tmp_path))
    assert others == [[], [], []]
    config: Config = config_of(exits, tmp_path)
    llm = EarlyExitLLM.from_config(config)
    options: tuple[dict[str, Any], ...] = (
        {"policy": "full"},
        {"threshold": [0.4]},
        {"policy": "fixed", "exit_layer": 4},
        {"policy": "speculative"},
    )
    wanted = []
    for body, option in zip(BODIES, options, strict=False):
        stop = (body["stop"],) if "stop" in body else ()
        params = SamplingParams(max_tokens=16, temperature=0.9, seed=body["seed"], stop=stop)
        wanted.append(llm.generate([body["prompt"]], params, **option)[0].text)
    assert first[:5] == [*wanted, "400"]
    for place, option, told in zip((5, 6), options, first[5:], strict=False):
        ids = llm.encode(BODIES[place]["prompt"])
        (score,) = llm.score([(ids[:1], ids[1:])], **option)
        assert told[: len(ids) - 1] == pytest.approx(score.logprobs, abs=1e-9)
        assert len(told) == len(ids) - 1 + BODIES[place].get("max_tokens", 16)
