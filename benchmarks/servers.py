"""Two servers under the same load: vLLM's, and `ee-tuning serve` at full depth, by threshold and speculatively.

    make test-engines        # installs .venv-engines
    python benchmarks/servers.py --engines .venv-engines/bin/python --model FOLDER --exits runs/it/exit_heads

Every client asks for one stream of --tokens tokens at the same moment. Servers run one after the other, each the best
of --rounds; the ratios are to vLLM's tokens/s.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ee_tuning.parallel.ports import free_port

PROMPT = "Question {}: what should a traveller know about the city? Answer: "
OURS: dict[str, dict[str, Any]] = {
    "ours, full depth": {"policy": "full"},
    "ours, threshold 0.8": {"policy": "threshold", "exit_threshold": 0.8},
    "ours, speculative": {"policy": "speculative"},
}


class Reading(NamedTuple):
    """One round."""

    first: float
    """Median seconds to the first token."""
    rate: float
    """Tokens per second of all clients."""


def main() -> None:
    """Prints a row for each server, policy and number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="Python of an environment with vLLM")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--exits", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    vllm = [
        str(options.engines.parent / "vllm"),
        "serve",
        options.model,
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
    ]
    ours = [sys.executable, "-m", "ee_tuning", "serve", "--model", options.model, "--exits", options.exits]
    print("| clients | server | first token, ms | tokens/s | ÷ vLLM |\n|---|---|---|---|---|", flush=True)
    plain: dict[int, float] = {}
    for command, ways in ((vllm, {"vLLM": {}}), (ours, OURS)):
        with served(command) as address:
            for count in options.clients:
                for name, keys in ways.items():
                    found = [measured(address, count, options.tokens, keys) for _ in range(options.rounds + 1)][1:]
                    rate = max(each.rate for each in found)
                    plain.setdefault(count, rate)
                    first = 1e3 * min(each.first for each in found)
                    print(f"| {count} | {name} | {first:.0f} | {rate:.0f} | {rate / plain[count]:.2f} |", flush=True)


@contextmanager
def served(command: list[str]) -> Iterator[tuple[str, int]]:
    """Yields the host and port of a server that answers."""
    address = "127.0.0.1", free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with subprocess.Popen(
        [*command, "--host", address[0], "--port", str(address[1])],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait(process, f"http://{address[0]}:{address[1]}/health")
            yield address
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float = 300) -> None:
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode} before it answered; start it by hand")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(1)
    raise SystemExit(f"{url} did not answer within {seconds:.0f} s")


def measured(address: tuple[str, int], count: int, tokens: int, keys: dict[str, Any]) -> Reading:
    """Runs one round of `count` clients."""

    async def streams() -> list[tuple[float, int]]:
        prompts = [PROMPT.format(f"{time.time_ns() % 100000}-{client}") for client in range(count)]
        return await asyncio.gather(*(_stream(address, prompt, tokens, keys) for prompt in prompts))

    began = time.perf_counter()
    found = asyncio.run(streams())
    seconds = time.perf_counter() - began
    return Reading(statistics.median(first - began for first, _ in found), sum(made for _, made in found) / seconds)


async def _stream(address: tuple[str, int], prompt: str, tokens: int, keys: dict[str, Any]) -> tuple[float, int]:
    """Returns the time of the first text, and the number of tokens."""
    reader, writer = await asyncio.open_connection(*address)
    wanted = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, **keys}
    body = json.dumps({**wanted, "model": None, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    first, made = 0.0, 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter()
        usage = json.loads(line[6:]).get("usage")
        made = usage["completion_tokens"] if usage else made
    writer.close()
    if not made:
        raise SystemExit(f"the server told no number of tokens for {prompt!r}")
    return first, made


if __name__ == "__main__":
    main()
