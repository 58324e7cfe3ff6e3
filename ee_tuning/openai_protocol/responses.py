"""Responses as strict JSON or as server-sent events, which stop when the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from ee_tuning.json_file import to_json
from ee_tuning.openai_protocol.api_errors import ApiError, error_body

DONE = "[DONE]"
_COMPACT: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}


class ClientLeft(Exception):
    """The client closed its connection."""


class StrictJson(Response):
    """JSON without NaN or infinity."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the bytes of the body."""
        return to_json(content, **_COMPACT).encode()


class ErrorJson(StrictJson):
    """An error in OpenAI's form. Its message appears in the request's line in the log, too."""

    def __init__(self, body: dict[str, Any], status: int, headers: dict[str, str] | None = None):
        self._message = body["error"]["message"]
        super().__init__(body, status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the error."""
        scope.setdefault("state", {})["error"] = self._message
        await super().__call__(scope, receive, send)


async def unless_client_leaves(request: Request, work: Awaitable[Any], seconds: float) -> Any:
    """Awaits `work`. Cancels it when the client leaves or the time is over, and raises ClientLeft or ApiError 408."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds or None, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft if leaving.done() else _too_late(seconds)
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: one object per line, then [DONE]; each list of objects is sent at once. `close` is called in
    any case, at once when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncIterator[list[Any]], close: Callable[[], None], seconds: float):
        self._objects, self._close, self._seconds = objects, close, seconds
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        await send_until_left(self._send_all(send), receive, self._close)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            # If the reader takes nothing, `send` blocks; the time limit still applies.
            async with asyncio.timeout(self._seconds or None):
                await self._send_objects(send)
        except TimeoutError:
            await self._send_error(send, _too_late(self._seconds))
        except ApiError as error:
            await self._send_error(send, error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_objects(self, send: Send) -> None:
        async with aclosing(self._objects) as objects:  # type: ignore[type-var]
            async for together in objects:
                if together:
                    await _send_events(send, [to_json(each, **_COMPACT) for each in together])
        await _send_events(send, [DONE])

    async def _send_error(self, send: Send, error: ApiError) -> None:
        await _send_events(send, [to_json(error_body(error.status_code, str(error.detail)), **_COMPACT)])


async def _send_events(send: Send, told: list[str]) -> None:
    body = "".join([f"data: {data}\n\n" for data in told]).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_until_left(sending: Coroutine[Any, Any, None], receive: Receive, close: Callable[[], None]) -> None:
    """Runs `sending` to its end, or until the client leaves, and calls `close` in any case."""
    sent, leaving = asyncio.ensure_future(sending), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({sent, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        close()
        for each in (sent, leaving):
            each.cancel()
        failure, _ = await asyncio.gather(sent, leaving, return_exceptions=True)
    if isinstance(failure, Exception):
        raise failure


async def _left(receive: Receive) -> None:
    """Waits until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_late(seconds: float) -> ApiError:
    return ApiError(
        408,
        f"a request must end within {seconds:g} seconds (--request-timeout), and this one did not; ask for fewer tokens",
    )
