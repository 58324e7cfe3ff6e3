"""The server, for long: two hundred clients, of whom a third of the requests leave early, and requests drawn from its
own OpenAPI.
"""

import asyncio
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from decoding_stress import Report
from exits import write_exits
from served import MODEL, config_of, served
from serving_fuzz import fuzz
from serving_load import Answers, alone, load, random_bodies

from ee_tuning import EarlyExitLLM

CLIENTS, BODIES, SLOTS = 200, 150, 16
SLACK_BYTES = 16 << 20
"""What a server may grow by between the second and the last quarter of its load: allocators round up."""


def stress_load(seconds: int, seed: int, folder: Path) -> Report:
    """So many seconds of load by CLIENTS clients on a server in a process of its own."""
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    bodies, report = random_bodies(BODIES, seed), Report()
    llm = EarlyExitLLM.load(MODEL, exits, dtype="float64")
    wanted = [alone(llm, body) for body in bodies]
    with _server(exits) as (url, process), _watched(process) as watch:
        began = time.monotonic()
        answers = asyncio.run(
            load(url, bodies, clients=CLIENTS, until=lambda begun: time.monotonic() - began >= seconds, seed=seed)
        )
        spent = time.monotonic() - began
        report.failures += answers.failures + _wrong(answers, wanted) + _left_over(url, answers)
    report.failures += watch.failures()
    made = sum(len(ids) for _, _, ids in answers.whole)
    report.told = (
        f"{CLIENTS} clients, {len(answers.whole)} whole answers ({made} tokens, {made / spent:.0f} a second on top of what "
        f"{answers.num_left} clients left behind), each equal to the same request alone; memory of the server "
        f"{watch.told()}."
    )
    return report


def stress_requests(count: int, seed: int, folder: Path) -> Report:
    """At least `count` requests drawn from the OpenAPI of a server with a short context."""
    exits, report = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy"), Report()
    with served(config_of(exits, folder), max_model_len=32, max_queue=4, request_timeout=20.0) as server:
        fuzzed = fuzz(server.url, count, seed)
        pool = server.service.jobs.engine.cache.pool
        if pool.num_free != pool.num_blocks:
            report.failures.append(f"{pool.num_blocks - pool.num_free} blocks are in use when all answers are there")
    report.failures += fuzzed.failures
    by_status = Counter[int]()
    for (_, status), number in fuzzed.statuses.items():
        by_status[status] += number
    if (sent := sum(by_status.values())) < count:
        report.failures.append(f"{sent} requests were sent, and {count} should have been")
    told = ", ".join(f"{number} × {status}" for status, number in sorted(by_status.items()))
    report.told = f"{sent} requests to all endpoints, half of the bodies against the rules: {told}; 0 × 5xx wanted."
    return report


def stress_connections(count: int, seed: int, folder: Path) -> Report:
    """So many connections at once that say nothing, and requests beside them."""
    report, held = Report(), list[socket.socket]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with _server(write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")) as (url, process):
        host, _, port = url.removeprefix("http://").rpartition(":")
        before = process.memory_info().rss
        while len(held) < count:
            held.append(socket.create_connection((host, int(port)), timeout=60))
        began = time.monotonic()
        body = b'{"prompt": "def f(", "max_tokens": 8, "temperature": 0}'
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            status = answer.status
        seconds, grown = time.monotonic() - began, process.memory_info().rss - before
        for connection in held:
            connection.close()
        report.failures += [] if status == 200 else [f"a request beside {count} connections got {status}"]
    report.told = (
        f"{count} open connections; a completion of 8 tokens beside them took {seconds:.2f} s; the server grew by "
        f"{grown / 2**20:.0f} MB."
    )
    return report


def _wrong(answers: Answers, wanted: list[tuple[str, list[int]]]) -> list[str]:
    return [
        f"request {place} alone: {wanted[place]!r:.300}, under load: {(text, ids)!r:.300}"
        for place, text, ids in answers.whole
        if (text, ids) != wanted[place]
    ]


def _left_over(url: str, answers: Answers) -> list[str]:
    """What the server still has, and requests that it counted otherwise than the clients did."""
    counts, until = _metrics(url), time.monotonic() + 30
    while (counts["num_requests_running"] or counts["num_requests_waiting"]) and time.monotonic() < until:
        time.sleep(0.2)
        counts = _metrics(url)
    ended = counts["request_success_total"]
    asked = len(answers.whole) + answers.num_left
    # A client that leaves may be seen when its answer is whole already.
    found = [] if ended == asked else [f"clients began {asked} requests, the server counted {ended:g}"]
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if counts[name]:
            found.append(f"{name} is {counts[name]:g} when all clients are gone")
    return found


def _metrics(url: str) -> Counter[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().split("\n") if line and not line.startswith("#")]
    sums = Counter[str]()
    for name, _, value in (line.rpartition(" ") for line in lines):
        sums[name.removeprefix("ee_tuning:").partition("{")[0]] += float(value)  # type: ignore[assignment]
    return sums


@contextmanager
def _server(exits: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address and the process of a server."""
    command = [sys.executable, "-m", "ee_tuning", "serve", "--model", str(MODEL), "--exits", str(exits), "--port", "0"]
    command += ["--dtype", "float64", "--max-batch-size", str(SLOTS), "--cache-tokens", "8192"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        stderr = process.stderr
        try:
            address = next(found[1] for line in stderr if (found := re.search(r"(http://\S+) serves", line)))
            # A log that nobody reads would stop the server.
            reader = threading.Thread(target=lambda: [None for _ in stderr])
            reader.start()
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()
        reader.join()


@dataclass
class _Watch:
    bytes: list[int] = field(default_factory=list)

    def _quarters(self) -> tuple[float, float]:
        quarter = max(1, len(self.bytes) // 4)
        return statistics.median(self.bytes[quarter : 2 * quarter] or [0]), statistics.median(self.bytes[-quarter:])

    def failures(self) -> list[str]:
        early, late = self._quarters()
        is_flat = late <= early + SLACK_BYTES
        return [] if is_flat else [f"memory grows: {early / 2**20:.0f} MB in the second quarter, then {self.told()}"]

    def told(self) -> str:
        early, late = self._quarters()
        return f"{early / 2**20:.0f} MB in the second quarter of the time, {late / 2**20:.0f} MB in the last"


@contextmanager
def _watched(process: psutil.Process) -> Iterator[_Watch]:
    """The resident memory of a process, once a second."""
    watch, is_over = _Watch(), threading.Event()

    def look() -> None:
        while not is_over.wait(1.0):
            watch.bytes.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        is_over.set()
        thread.join()
