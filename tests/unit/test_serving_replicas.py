"""Replicas behind one port: who gets a request, and that the front passes on what replicas say."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning import SamplingParams
from ee_tuning.config import replace
from ee_tuning.errors import InputError

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
pytest.importorskip("aiohttp")

from ee_tuning.serving.front import build_front
from ee_tuning.serving.joined_metrics import joined_metrics
from ee_tuning.serving.replica_set import Replica, ReplicaSet
from ee_tuning.serving.replicated import _LONGEST_SOCKET, serve_replicas, socket_place
from ee_tuning.serving.routing import Asked, Router, asked_of
from ee_tuning.serving.server import address_of, bind, make_server
from ee_tuning.serving.settings import ServeSettings

LONG = "class Reader:\n    def __init__(self, path):\n" * 12


def test_the_replica_with_the_least_left_to_do_is_asked():
    """Requests that pile up at one replica while the other is idle; an idle pair of which one never works."""
    router = Router(2)
    assert {router.choose("", (0, 1)) for _ in range(2)} == {0, 1}
    router.loads[0] = 300
    assert [router.choose("x", (0, 1)) for _ in range(2)] == [1, 1]
    assert router.choose("x", (0,)) == 0


def test_a_prompt_goes_where_its_beginning_is_known():
    """A conversation that is read anew by another replica at every turn; a popular beginning that keeps one replica
    busy and the other idle.
    """
    router = Router(2)
    first = router.choose(LONG, (0, 1))
    other = 1 - first
    assert router.choose("something else", (0, 1)) == other
    for turn in range(3):
        assert router.choose(f"{LONG}{LONG}{turn}", (0, 1)) == first
    router.loads[first] = 75  # its reading saves more
    assert router.choose(LONG, (0, 1)) == first
    router.loads[first] = 500
    assert router.choose(LONG, (0, 1)) == other
    router.loads[first] = 0  # by now both know it
    router.loads[other] = 20
    assert router.choose(LONG, (0, 1)) == first
    assert router.choose(LONG, (other,)) == other


def test_a_body_says_how_much_work_it_is():
    """A request for 2,000 tokens that counts like one for 10; a body of nonsense that ends the front."""
    assert asked_of({"prompt": "x" * 320, "max_tokens": 10, "n": 3}) == Asked("x" * 320, 10.0, 30)
    assert asked_of({"prompt": ["ab", "cd"], "max_tokens": 10}).made == 20
    assert asked_of({"prompt": [5, 17, 80]}) == Asked("   5  17  80", 3 / 8, 16)
    chat = asked_of({"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 7})
    assert "hi" in chat.prompt and chat.made == 7
    for nonsense in (
        None,
        3,
        [],
        {},
        {"prompt": 3},
        {"messages": [1]},
        {"prompt": [None], "max_tokens": "x", "n": True},
    ):
        asked_of(nonsense)


def test_metrics_of_replicas_are_one_text():
    """Prometheus refuses a family that comes twice, and samples of two replicas that have the same labels."""
    text = '# HELP a:b_total B.\n# TYPE a:b_total counter\na:b_total{model_name="m"} %d\n'
    joined = joined_metrics({0: text % 3, 1: text % 4}, {0: True, 1: True, 2: False}).decode()
    assert joined.count("# TYPE a:b_total counter") == 1
    assert 'a:b_total{engine="0",model_name="m"} 3.0' in joined and 'engine="1",model_name="m"} 4.0' in joined
    assert 'ee_tuning:replica_up{engine="2"} 0.0' in joined


class Fronted:
    """Two servers of this process behind a front in a thread of its own."""

    def __init__(self, servers: list[Served], paths: list[Path]):
        self.servers = servers
        self.replicas = ReplicaSet([Replica(index, str(path)) for index, path in enumerate(paths)])
        settings = ServeSettings(port=0, api_keys=("secret",), drain_timeout=5.0, max_body_bytes=10_000)
        self._listening = bind(settings)
        self.url = address_of(self._listening, settings)
        self.server = make_server(build_front(self.replicas, settings), self.replicas, settings)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.thread.start()

    async def _run(self) -> None:
        await self.server.serve(sockets=[self._listening])
        for replica in self.replicas.replicas:
            await replica.close()

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str = "secret") -> tuple[int, Any]:
        """Status and body of an answer."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
        raw = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, raw, headers), timeout=60) as answer:
                assert answer.headers["X-Request-Id"] == "mine"
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def num_finished(self) -> list[int]:
        """Completions that each server has ended."""
        told = self.ask("/metrics")[1]
        return [
            sum(
                int(float(line.rpartition(" ")[2]))
                for line in told.split("\n")
                if line.startswith("ee_tuning:request_success_total") and f'engine="{engine}"' in line
            )
            for engine in range(2)
        ]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    folder = tmp_path_factory.mktemp("fronted")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    paths = [folder / f"{index}.sock" for index in range(2)]
    with ExitStack() as stack:
        running = Fronted(
            [stack.enter_context(served(config_of(exits, folder), uds=str(path))) for path in paths], paths
        )
        yield running
        running.server.should_exit = True
        running.thread.join(30)


def test_answers_are_those_of_a_replica(front):
    """An answer, a stream or an error that the front changes; one replica that gets everything."""
    before = front.num_finished()
    prompts = [f"def f{place}(" for place in range(4)]
    wanted = front.servers[0].reference.generate(prompts, SamplingParams(max_tokens=12), policy="full")
    for prompt, done in zip(prompts, wanted, strict=True):
        asked = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "policy": "full"}
        code, whole = front.ask("/v1/completions", asked)
        assert code == 200 and json.loads(whole)["choices"][0]["text"] == done.text
        code, stream = front.ask("/v1/completions", {**asked, "stream": True})
        events = [line.removeprefix("data: ") for line in stream.split("\n") if line]
        assert code == 200 and events.pop() == "[DONE]"
        assert "".join(json.loads(each)["choices"][0]["text"] for each in events) == done.text
    assert [late - early for early, late in zip(before, front.num_finished(), strict=True)] == [4, 4]
    assert front.replicas.num_unfinished == 0 and front.replicas.router.loads == pytest.approx([0, 0])
    code, models = front.ask("/v1/models")
    assert code == 200 and json.loads(models)["data"][0]["id"] == "tiny-python-llama"
    for body, status, says in (
        ({"prompt": "x", "temprature": 1}, 400, "temperature"),
        ({"prompt": "x", "model": "other"}, 404, "model must be one of"),
        ({"prompt": "x" * 20_000}, 413, "--max-body-bytes"),
    ):
        code, told = front.ask("/v1/completions", body)
        assert code == status and says in told
    assert front.ask("/nothing")[0] == 404
    assert front.ask("/v1/models", key="wrong")[0] == 401 and front.ask("/health", key="wrong")[0] == 200


def test_a_client_that_leaves_is_noticed_by_the_replica(front):
    """Tokens that are made for no one, as long as the longest answer lasts."""
    host, _, port = front.url.removeprefix("http://").rpartition(":")

    async def leave() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps({"prompt": "x", "max_tokens": 450, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await reader.readuntil(b"data: ")
        writer.close()

    asyncio.run(leave())
    until = time.monotonic() + 30
    while any(server.service.client.num_unfinished for server in front.servers) and time.monotonic() < until:
        time.sleep(0.01)
    assert 'finished_reason="abort"' in front.ask("/metrics")[1]
    assert front.replicas.num_unfinished == 0 and front.replicas.router.loads == pytest.approx([0, 0])


def test_a_dead_replica_is_told_and_not_asked(front):
    """A server that sends requests to a dead replica, or calls itself well while half of it is gone."""
    front.replicas.replicas[1].why_dead = "was ended by SIGKILL"
    try:
        code, told = front.ask("/health")
        assert code == 503 and "replica 1 was ended by SIGKILL; the others go on" in told
        assert front.ask("/ready") == (200, '{"status":"ok","replicas":1}')
        before = front.num_finished()[0]
        for _ in range(3):
            assert front.ask("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
        assert front.num_finished()[0] == before + 3
    finally:
        front.replicas.replicas[1].why_dead = None
    front.replicas.is_draining = True
    try:
        assert front.ask("/ready")[0] == 503
        assert front.ask("/v1/completions", {"prompt": "x"})[0] == 503
        assert front.ask("/health")[0] == 200
    finally:
        front.replicas.is_draining = False


def test_replicas_take_no_budget_that_each_would_measure(tmp_path: Path):
    """The same request, answered at one exit or another as the replica's moment of measuring had it."""
    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4], init="copy")
    config = replace(config_of(exits, tmp_path), generation={"budget": 0.5})
    with pytest.raises(InputError, match=r"generation\.budget is measured by each replica"):
        serve_replicas(config, ServeSettings(data_parallel_size=2))


def test_sockets_lie_where_their_paths_are_short_enough(monkeypatch: pytest.MonkeyPatch):
    """A cluster's long TMPDIR, at which a server without --uds ends with a word on --uds."""
    for length, place in ((69, "/" + "t" * 69), (70, "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", "/" + "t" * length)
        assert socket_place() == place
    folder = tempfile.mkdtemp(dir="/tmp")  # pytest's own folders may have too long a path
    try:
        with socket.socket(socket.AF_UNIX) as made, pytest.raises(OSError, match="too long"):
            made.bind(f"{folder}/".ljust(_LONGEST_SOCKET + 1, "s"))
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"{folder}/".ljust(_LONGEST_SOCKET, "s"))
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_killed_replica_takes_its_own_requests_alone(tmp_path: Path):
    """A stream that waits for a dead replica for ever; a server that ends with one of its replicas, or that lives on as
    processes of which nobody knows.
    """
    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4, 8], init="copy")
    command = [sys.executable, "-m", "ee_tuning", "serve", "--model", str(MODEL), "--exits", str(exits)]
    own = ["--data-parallel-size", "2", "--port", "0", "--max-batch-size", "2"]
    with subprocess.Popen([*command, *own], stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        try:
            found = (re.search(r"(http://\S+) serves \S+ by 2 replicas", line) for line in process.stderr)
            url = next(each[1] for each in found if each)
            replicas = [
                child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
            ]
            ends = asyncio.run(asyncio.wait_for(_streams_beside_a_death(url, replicas[1]), 120))
            assert sorted(ends) == [False, True]
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{url}/health", timeout=30)
            urllib.request.urlopen(f"{url}/ready", timeout=30)
            process.terminate()
            assert process.wait(60) == 0 and not any(child.is_running() for child in replicas)
        finally:
            process.kill()


async def _streams_beside_a_death(url: str, replica: psutil.Process) -> list[bool]:
    """Whether each of two streams, one of each replica, came to its end, where one of the replicas is killed."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    streams = []
    for prompt in ("def main(", "import os"):
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps({"prompt": prompt, "max_tokens": 480, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await reader.readuntil(b"data: ")
        streams.append((reader, writer))
    replica.kill()
    told = [await reader.read() for reader, _ in streams]
    for _, writer in streams:
        writer.close()
    assert all(b"[DONE]" in each or b"replica 1 has failed" in each for each in told)
    return [b"[DONE]" in each for each in told]
