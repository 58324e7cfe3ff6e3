"""vLLM in processes of its own environment: the `LLM` class by benchmarks/vllm_runs.py, and `vllm serve` over HTTP."""

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

ROOT = Path(__file__).parents[2]
ENGINES = os.environ.get("EE_TUNING_ENGINES", "")
"""The Python of the engines' environment."""


def runs_of(job: dict[str, Any], folder: Path) -> dict[str, Any]:
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
    runs: dict[str, Any] = json.loads((folder / "answer.json").read_text())["runs"]
    return runs


def environment() -> dict[str, str]:
    """What the engines' processes see: nothing of this project's path."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}


def served(job: dict[str, Any], folder: Path, model: str, *words: str) -> tuple[list[list[int]], float]:
    """Returns what `vllm serve MODEL WORDS` answers the job's prompts over HTTP, and its number of accepted drafts."""
    tokens = []
    asked = {"model": model, "max_tokens": job["max_tokens"], "temperature": 0, "ignore_eos": True}
    words = ("--max-model-len", str(job["max_model_len"]), *words)
    with server(folder, model, *words) as address:
        for prompt in job["prompts"]:
            answer = post(f"{address}/v1/completions", {**asked, "prompt": prompt, "return_token_ids": True})
            tokens.append(answer["choices"][0]["token_ids"])
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
    accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    return tokens, float(accepted[1]) if accepted else 0.0


@contextmanager
def server(folder: Path, model: str, *words: str) -> Iterator[str]:
    """`vllm serve` on a free port, as a user starts it; the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(ENGINES).parent / "vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", *words]
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
