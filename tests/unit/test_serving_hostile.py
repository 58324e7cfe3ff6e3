"""Clients that mean harm or break off: an answer in OpenAI's form or a closed connection, and the server goes on."""

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning.errors import InputError
from ee_tuning.serving.settings import ServeSettings, read_api_keys

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    settings = {"max_body_bytes": 20_000, "max_queue": 2, "request_timeout": 4.0}
    with served(config_of(exits, folder), **settings) as running:
        yield running


def talk(server: Served, raw: bytes) -> bytes:
    """What the server answers to these bytes, to the end of its connection."""
    with _connected(server) as connection:
        connection.sendall(raw)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def _connected(server: Served) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def post(body: bytes, path: str = "/v1/completions", kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["message"]


def completion(**changes: Any) -> bytes:
    return json.dumps({"prompt": "def f(", "max_tokens": 900, "ignore_eos": True, "temperature": 0, **changes}).encode()


BODIES: dict[str, tuple[bytes, int, str]] = {
    "deep": (b"[" * 9000 + b"]" * 9000, 400, "nested too deeply"),
    "deep values": (b'{"prompt":' + b'{"a":' * 900 + b"1" + b"}" * 901, 400, ""),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, "not finite"),
    "1e999": (b'{"prompt": "a", "temperature": 1e999}', 400, "not finite"),
    "many digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "strict JSON"),
    "seed": (b'{"prompt": "a", "seed": 9223372036854775808}', 400, "seed"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "strict JSON"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "UTF-8"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', 400, "twice"),
    "list": (b"[]", 400, ""),
    "null": (b"null", 400, "object"),
    "empty": (b"", 400, ""),
    "number": (b"1", 400, ""),
    "boolean": (b'{"prompt": "a", "n": true}', 400, "n can not be used"),
    "large": (b'{"prompt": "' + b"a" * 30_000 + b'"}', 413, "at most 20000 bytes"),
    "token": (b'{"prompt": [999999]}', 400, "token ids must lie in"),
    "negative token": (b'{"prompt": [-1]}', 400, "token ids must lie in"),
    "mixed": (b'{"prompt": ["a", 1]}', 400, "prompt can not be used"),
    "name": (b'{"prompt": "a", "\\u0000\\u202e": 1}', 400, "unknown parameter"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_of_no_use_is_refused(server, case):
    """A body that ends in 500, that stops the server, or whose text comes back with control characters."""
    body, status, words = BODIES[case]
    got, message = error_of(talk(server, post(body)))
    assert (got, words in message) == (status, True), message
    assert message.isprintable()


@pytest.mark.parametrize(
    "path",
    ["/../etc/passwd", "/page/../../command.py", "/%2e%2e/setup.py", "/page.html", "//", "/v1/models/..%2f..", "/v1"],
)
def test_no_path_leads_out(server, path):
    """The page's folder as a way to other files."""
    status, _ = error_of(talk(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()))
    assert status in (404, 405)


def test_another_content_type_and_method_are_refused(server):
    """A web page may send text/plain to any server without asking; JSON it may not."""
    assert error_of(talk(server, post(completion(), kind="text/plain")))[0] == 415
    assert error_of(talk(server, b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))[0] == 405


CHAT: dict[str, dict[str, Any]] = {
    "no messages": {"messages": []},
    "no role": {"messages": [{"content": "x"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "template": {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 7 }}"}},
    "tokenize": {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": True}},
    "both": {
        "messages": [{"role": "user", "content": "x"}],
        "continue_final_message": True,
        "add_generation_prompt": True,
    },
    "top": {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3},
}


@pytest.mark.parametrize("case", CHAT)
def test_a_chat_of_no_use_is_refused(server, case):
    """A template of the client's own that runs here; an argument of a function in place of a variable."""
    assert error_of(talk(server, post(json.dumps(CHAT[case]).encode(), "/v1/chat/completions")))[0] == 400


def wait_until_idle(server: Served, seconds: float = 20.0) -> None:
    engine, until = server.service.jobs.engine, time.monotonic() + seconds
    while server.service.client.num_unfinished or not engine.is_idle:
        assert time.monotonic() < until, "what was asked by clients that left is still decoded"
        time.sleep(0.01)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_memory(server, streams):
    """Completions that go on for a client that is gone, until nothing else has room."""
    for _ in range(3):
        with _connected(server) as connection:
            connection.sendall(post(completion(stream=streams, n=2)))
            if streams:
                assert b"data: " in connection.recv(65536) + connection.recv(65536)
            else:
                until = time.monotonic() + 20
                while not server.service.client.num_unfinished:
                    assert time.monotonic() < until
                    time.sleep(0.005)
    wait_until_idle(server)
    pool = server.service.jobs.engine.cache.pool
    assert pool.num_free == pool.num_blocks


def test_connections_that_say_nothing_or_half_hold_no_one_up(server):
    """A server with a thread for each connection, and one that waits for the end of a request that never ends."""
    with ExitStack() as held:
        for index in range(300):
            connection = held.enter_context(_connected(server))
            connection.sendall((b"", b"POST /v1/completions HTT", post(completion())[:-10])[index % 3])
        assert talk(server, post(completion(max_tokens=2))).split()[1] == b"200"
        for connection in (_connected(server) for _ in range(3)):
            connection.sendall(post(completion(n=2)))
            connection.shutdown(socket.SHUT_WR)  # what has to be taken for a client that left
            held.enter_context(connection)
        until = time.monotonic() + 20
        while (
            status := talk(server, post(completion(max_tokens=1))).split()[1]
        ) == b"429" and time.monotonic() < until:
            time.sleep(0.05)  # the half-closed ones may be in the queue still
        assert status == b"200"
        wait_until_idle(server)


def test_a_flood_of_headers_is_refused(server):
    """Memory for headers that never end."""
    flood = b"".join(b"X-%d: %s\r\n" % (index, b"a" * 200) for index in range(2000))
    try:
        answer = talk(server, b"GET /health HTTP/1.1\r\nHost: x\r\n" + flood)
    except ConnectionError:  # closed before all of it was read
        answer = b""
    assert answer == b"" or answer.split()[1] in (b"400", b"431")
    assert talk(server, post(completion(max_tokens=1))).split()[1] == b"200"


def test_more_than_the_queue_holds_gets_429(server):
    """A queue without an end, or one that forgets to make room again."""
    with _connected(server) as connection:
        connection.sendall(post(completion(stream=True, n=6)))
        assert connection.recv(10)
        answer = talk(server, post(completion(max_tokens=1)))
        assert error_of(answer)[0] == 429 and b"retry-after: 1" in answer.lower()
    wait_until_idle(server)
    assert talk(server, post(completion(max_tokens=1))).split()[1] == b"200"


def test_time_ends_a_request(server, monkeypatch):
    """A request that holds its memory for as long as it likes; a reader that takes nothing does, too."""
    step = type(server.service.jobs.engine).step

    def slow_step(engine: Any) -> Any:
        time.sleep(0.05)
        return step(engine)

    monkeypatch.setattr(type(server.service.jobs.engine), "step", slow_step)
    with _connected(server) as silent:
        silent.sendall(post(completion(stream=True)))  # and never reads
        status, message = error_of(talk(server, post(completion())))
        assert status == 408 and "within 4 seconds" in message
        stream = talk(server, post(completion(stream=True)))
        assert stream.count(b"[DONE]") == 0 and b'"error":' in stream.replace(b'"error": ', b'"error":')
        wait_until_idle(server)


def test_signals_drain_first(server, monkeypatch):
    """A request that SIGTERM cuts off, or a new one that delays the end."""
    web, client = server.service.server, server.service.client
    with _connected(server) as connection:
        connection.sendall(post(completion(stream=True, max_tokens=300)))
        assert connection.recv(10)
        monkeypatch.setattr(web, "_client", SimpleNamespace(num_unfinished=1, is_alive=True))  # goes on for the others
        web.handle_exit(signal.SIGTERM, None)
        client.is_draining = True
        assert error_of(talk(server, post(completion(max_tokens=1))))[0] == 503
        assert error_of(talk(server, b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))[0] == 503
        assert talk(server, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").split()[1] == b"200"
        said = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"[DONE]" in said
    assert not web.should_exit
    client.is_draining, web._drain_until = False, None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"port": 70000}, "--port must be a port"),
        ({"max_queue": -1}, "--max-queue"),
        ({"root_path": "x"}, "--root-path must begin with a slash"),
        ({"ssl_certfile": "x"}, "TLS needs both"),
        ({"ssl_certfile": "/nope", "ssl_keyfile": "/nope"}, "--ssl-certfile must be a file"),
    ],
)
def test_settings_of_no_use_are_refused(changes, words):
    """A server that starts, and fails at its first request."""
    with pytest.raises(InputError, match=words):
        ServeSettings(**changes).check()


def test_keys_come_from_a_file(tmp_path):
    """A line end that is a part of the key; a key file that is empty, and lets everyone in."""
    (tmp_path / "keys").write_text("one\r\n\n two \n")
    assert read_api_keys(["zero"], tmp_path / "keys") == ("zero", "one", "two")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(InputError, match="which is empty"):
        read_api_keys([], tmp_path / "keys")
    with pytest.raises(InputError, match="printable"):
        read_api_keys(["é"], None)
    with pytest.raises(InputError, match="can not be read"):
        read_api_keys([], Path(tmp_path / "none"))


def test_a_unix_socket_is_this_users_alone(tmp_path):
    """A socket that all users of the machine may write to; a server that can not start where another was killed."""
    from ee_tuning.serving.server import bind

    settings = ServeSettings(uds=str(tmp_path / "server.sock"))
    first = bind(settings)
    assert (tmp_path / "server.sock").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="--uds must be a path for a new socket"):
        bind(settings)
    first.close()
    bind(settings).close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Address already in use"):
        bind(ServeSettings(uds=str(tmp_path / "file")))
    taken = bind(ServeSettings(port=0))
    with pytest.raises(InputError, match="give another --port"):
        bind(ServeSettings(port=taken.getsockname()[1]))
    taken.close()
