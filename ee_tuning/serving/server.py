"""The HTTP server around the app, and its end: the first signal drains, the second one ends it at once."""

import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import sys
import time
from types import FrameType
from typing import Any, Protocol

import uvicorn

from ee_tuning.errors import InputError
from ee_tuning.serving.settings import ServeSettings

log = logging.getLogger("ee_tuning.serving")
_BACKLOG = 2048
"""Connections that wait to be accepted."""
_LAST_ANSWERS_SECONDS = 2
"""Seconds for sending the last answers after draining."""


class Requests(Protocol):
    """The requests that a server has taken."""

    num_unfinished: int
    is_draining: bool
    """Whether new requests are refused."""

    @property
    def is_alive(self) -> bool:
        """Whether requests can be answered."""


class DrainingServer(uvicorn.Server):
    """A server that drains after SIGTERM or Ctrl-C: it ends when its requests have, and new ones get 503 meanwhile."""

    def __init__(self, config: uvicorn.Config, client: Requests, drain_timeout: float):
        super().__init__(config)
        self._client, self._drain_timeout = client, drain_timeout
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal, and ends on the second one."""
        if self._drain_until is not None:
            self.should_exit = self.force_exit = True
            return
        self._client.is_draining = True
        self._drain_until = time.monotonic() + self._drain_timeout
        log.info("%s: draining, %d completions to go", signal.Signals(sig).name, self._client.num_unfinished)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to end."""
        drained = self._drain_until is not None and (
            self._client.num_unfinished == 0 or time.monotonic() >= self._drain_until
        )
        self.should_exit = self.should_exit or drained or not self._client.is_alive
        return await super().on_tick(counter)


def make_server(app: Any, client: Requests, settings: ServeSettings) -> DrainingServer:
    """Returns a server that is not started yet."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # root_path is the app's: uvicorn would put it before paths that a proxy has cut it off from
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )
    return DrainingServer(config, client, settings.drain_timeout)


def bind(settings: ServeSettings) -> socket.socket:
    """Returns a listening socket. Raises InputError where the address is taken or not this machine's."""
    try:
        return _unix_socket(settings.uds) if settings.uds is not None else _tcp_socket(settings.host, settings.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        if settings.uds is not None:
            raise InputError(
                f"--uds must be a path for a new socket, and {settings.uds} is not: {reason}; give another path"
            ) from error
        raise InputError(
            f"--host and --port must be a free address of this machine, and {settings.host}:{settings.port} is not: "
            f"{reason}; give another --port, or 0 for any free one"
        ) from error


def _tcp_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen(_BACKLOG)
    return listening


def _unix_socket(path: str) -> socket.socket:
    """Returns a socket that only this user may use. It replaces the one that an ended server left there."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and listening.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
    former = os.umask(0o177)
    try:
        listening.bind(path)
    finally:
        os.umask(former)
    listening.listen(_BACKLOG)
    return listening


def address_of(listening: socket.socket, settings: ServeSettings) -> str:
    """Returns the address of the server for clients."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host, port = listening.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def set_up_logs() -> None:
    """Sets up logging: lines on stderr, with the time."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
