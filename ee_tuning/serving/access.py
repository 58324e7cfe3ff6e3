"""Middleware of all requests: their id, the API key, and a line in the log."""

import hmac
import logging
import re
import secrets
import time

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ee_tuning.json_file import to_json
from ee_tuning.openai_protocol.api_errors import error_body
from ee_tuning.openai_protocol.responses import ErrorJson
from ee_tuning.serving.settings import ServeSettings

log = logging.getLogger("ee_tuning.serving")

_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_OPEN = ("/health", "/ready", "/ping", "/", "/page.js", "/page.css")
"""Paths that need no key: probes, and the page, which asks for the key itself."""


def add_access(app: FastAPI, settings: ServeSettings) -> None:
    """Adds the check of API keys and, for browsers, of their pages' origins."""
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Access, api_keys=settings.api_keys)


class Access:
    """ASGI middleware around the app."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...] = ()):
        self._app, self._keys = app, tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request to the app, or answers 401."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        status = 499  # the client left before an answer began
        scope.setdefault("state", {}).update(request_id=request_id, began=time.time_ns())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        try:
            if self._keys and path not in _OPEN and not is_preflight and not self._knows(headers):
                await _unknown()(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            if path not in _OPEN:
                seconds = round(time.perf_counter() - began, 4)
                line = {"id": request_id, "method": scope["method"], "path": path[:200], "status": status}
                error = scope["state"].get("error")
                log.info(to_json({**line, "seconds": seconds, **({"error": error[:300]} if error else {})}))

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", errors="replace") if scheme.lower() == "bearer" else b""
        # All keys are compared, each in constant time.
        return any([hmac.compare_digest(given, known) for known in self._keys])


def _unknown() -> ErrorJson:
    message = "a request must bring one of the server's API keys, and this one did not; send Authorization: Bearer KEY"
    return ErrorJson(error_body(401, message, code="invalid_api_key"), 401, headers={"WWW-Authenticate": "Bearer"})
