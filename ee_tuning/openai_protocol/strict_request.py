"""Strict reading of request bodies: bounded in size and time, and JSON with one meaning only."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from ee_tuning.json_file import parse_strict_json
from ee_tuning.openai_protocol.api_errors import ApiError

SECONDS_FOR_BODY = 30.0


class StrictRequest(Request):
    """A request whose body is refused where it is too large, too slow, or no strict JSON object."""

    async def stream(self) -> AsyncIterator[bytes]:  # type: ignore[override]
        """The parts of the body."""
        limit, size = self.app.state.max_body_bytes, 0
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(SECONDS_FOR_BODY):
                async for part in super().stream():
                    size += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    yield part
        except TimeoutError as error:
            raise ApiError(
                408, f"a body must be sent within {SECONDS_FOR_BODY:g} seconds, and this one was not; send it again"
            ) from error

    async def json(self) -> Any:
        """The body as an object."""
        body = await self.body()
        try:
            return parse_strict_json(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise ApiError(400, f"the body must be strict JSON, and is not: {reason}; mend it") from error


class StrictRoute(APIRoute):
    """A route that reads bodies as StrictRequest does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"a body must have at most {limit} bytes (--max-body-bytes), and this one has more; send a shorter one"
    )
