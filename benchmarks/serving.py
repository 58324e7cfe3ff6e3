"""The cost of serving: time to the first token, time between tokens and tokens/s of `ee-tuning serve`, against the same
prompts in one call of EarlyExitLLM.

    python benchmarks/serving.py --model examples/tiny-python-llama --exits runs/demo/exit_heads

Every client asks for one stream after the other. Both take turns, and the best of the rounds counts. The last columns
are the processor's time for a token, by all threads of the process: with OMP_NUM_THREADS=1 it is the same on a busy
machine. Prints the table of docs/benchmarks.md.
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from ee_tuning import EarlyExitLLM, SamplingParams

PROMPT = "import os\n\n\ndef read_{}("


class Reading(NamedTuple):
    """One round."""

    first: float
    """Median seconds to the first token."""
    between: float
    """Median seconds between tokens."""
    rate: float
    """Tokens per second of all clients."""
    cpu: float
    """Processor seconds per token."""


def main() -> None:
    """Prints a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exits", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threshold", type=float, default=0.8)
    options = parser.parse_args()
    llm = EarlyExitLLM.load(options.model, options.exits)
    print(
        "| clients | first token, ms: offline | served | between tokens, ms: offline | served | tokens/s: offline | served | "
        "ratio | CPU, µs/token: offline | served |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    with served(options) as (address, server):
        for count in options.clients:
            rounds = []
            for number in range(options.rounds + 1):  # the first one warms up
                prompts = [PROMPT.format(f"{number}_{client}") for client in range(count)]
                rounds.append((offline(llm, prompts, options), online(address, server, prompts, options)))
            alone, there = ([pair[side] for pair in rounds[1:]] for side in (0, 1))
            rates = max(each.rate for each in alone), max(each.rate for each in there)
            cells = [count]
            for name in ("first", "between"):
                cells += [f"{1e3 * min(getattr(each, name) for each in side):.1f}" for side in (alone, there)]
            print(
                f"| {' | '.join(map(str, cells))} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} "
                f"| {1e6 * min(each.cpu for each in alone):.0f} | {1e6 * min(each.cpu for each in there):.0f} |",
                flush=True,
            )


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """Yields the address of a server, and its process."""
    command = [sys.executable, "-m", "ee_tuning", "serve", "--model", str(options.model), "--exits", str(options.exits)]
    with subprocess.Popen(
        [*command, "--threshold", str(options.threshold), "--port", "0"], stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stderr is not None
        stderr = process.stderr
        # An unread log would block the server.
        reader = threading.Thread(target=lambda: [None for _ in stderr])
        try:
            for line in stderr:
                if found := re.search(r"http://(\S+) serves", line):
                    reader.start()
                    yield found[1], psutil.Process(process.pid)
                    break
        finally:
            process.terminate()
            if reader.ident is not None:
                reader.join()


def offline(llm: EarlyExitLLM, prompts: list[str], options: argparse.Namespace) -> Reading:
    """Completes all prompts in one call."""
    began, spent, times = time.perf_counter(), _cpu(psutil.Process()), [list[float]() for _ in prompts]
    params = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    for token in llm.stream(prompts, None, params, policy="threshold", threshold=options.threshold):
        times[token.index].append(time.perf_counter())
    return _reading(began, times, _cpu(psutil.Process()) - spent)


def online(address: str, server: psutil.Process, prompts: list[str], options: argparse.Namespace) -> Reading:
    """Requests a stream for each prompt."""

    async def streams() -> list[list[float]]:
        return await asyncio.gather(*(_stream(address, prompt, options.tokens) for prompt in prompts))

    began, spent = time.perf_counter(), _cpu(server)
    times = asyncio.run(streams())
    return _reading(began, times, _cpu(server) - spent)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _stream(address: str, prompt: str, max_tokens: int) -> list[float]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    wanted = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = json.dumps({**wanted, "return_exit_layers": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    times = []
    async for line in reader:
        if b'"exit_layers"' in line:
            times.append(time.perf_counter())
    writer.close()
    return times


def _reading(began: float, times: list[list[float]], cpu: float) -> Reading:
    gaps = [late - early for each in times for early, late in itertools.pairwise(each)]
    last = max(each[-1] for each in times)
    return Reading(
        statistics.median(each[0] - began for each in times),
        statistics.median(gaps),
        sum(map(len, times)) / (last - began),
        cpu / sum(map(len, times)),
    )


if __name__ == "__main__":
    main()
