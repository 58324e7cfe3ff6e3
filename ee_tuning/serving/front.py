"""The front of several replicas: passes each request to one of them, and its answer back as it comes.

A replica is a whole server, which checks and answers requests by itself. The front has the parts that exist once:
access, bounds of bodies, health, metrics. It imports no engine, so that it starts its replicas at once.
"""

from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from ee_tuning.json_file import parse_json, to_json
from ee_tuning.openai_protocol.api_errors import ApiError, error_body
from ee_tuning.openai_protocol.responses import StrictJson, send_until_left, unless_client_leaves
from ee_tuning.openai_protocol.strict_request import StrictRequest
from ee_tuning.serving.access import add_access
from ee_tuning.serving.error_handlers import add_error_handlers
from ee_tuning.serving.joined_metrics import CONTENT_TYPE
from ee_tuning.serving.replica_set import Lease, ReplicaSet
from ee_tuning.serving.routing import Asked, asked_of
from ee_tuning.serving.settings import ServeSettings

_DECODING = ("/v1/completions", "/v1/chat/completions")
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_OF_A_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
_NOT_ASKED = _OF_A_CONNECTION | {b"host", b"content-length", b"authorization", b"expect", b"x-request-id"}
_NOT_ANSWERED = _OF_A_CONNECTION | {b"date", b"x-request-id"}


def build_front(replicas: ReplicaSet, settings: ServeSettings) -> FastAPI:
    """Builds the app of the front."""
    app = FastAPI(title="ee_tuning", root_path=settings.root_path, openapi_url=None)
    app.state.max_body_bytes = settings.max_body_bytes
    front = Front(replicas)
    gets = {"/health": front.health, "/ping": front.health, "/ready": front.ready, "/metrics": front.metrics}
    for path, endpoint in gets.items():
        app.add_route(path, endpoint, methods=["GET"])
    app.add_route("/{path:path}", front.pass_on, methods=_METHODS)
    add_error_handlers(app)
    add_access(app, settings)
    return app


class Front:
    """The endpoints."""

    def __init__(self, replicas: ReplicaSet):
        self._replicas = replicas

    async def health(self, request: Request) -> Response:
        """Answers whether all replicas are alive."""
        dead = [replica for replica in self._replicas.replicas if not replica.is_alive]
        if dead:
            told = "; ".join(f"replica {replica.index} {replica.why_dead}" for replica in dead)
            others = "the others go on" if self._replicas.is_alive else "none is left"
            raise ApiError(503, f"{told}; {others}; start the server again")
        return StrictJson({"status": "ok", "replicas": len(self._replicas.replicas)})

    async def ready(self, request: Request) -> Response:
        """Answers whether new requests are taken: as long as a replica is alive."""
        if self._replicas.is_draining:
            raise ApiError(503, "the server is shutting down and takes no new requests", retry_after=5)
        if not self._replicas.is_alive:
            return await self.health(request)
        return StrictJson({"status": "ok", "replicas": len(self._replicas.alive)})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics of all replicas."""
        return Response(await self._replicas.metrics(), headers={"Content-Type": CONTENT_TYPE})

    async def pass_on(self, request: Request) -> Response:
        """Passes a request on to a replica."""
        body = b""
        if request.method in ("POST", "PUT", "PATCH"):
            request = StrictRequest(request.scope, request.receive)
            body = await request.body()
        asked = Asked("", 0, 0)
        if request.url.path.endswith(_DECODING) and body:
            if self._replicas.is_draining:
                raise ApiError(
                    503, "the server is shutting down and takes no new requests; ask another one", retry_after=5
                )
            asked = _asked(body)
        lease = self._replicas.lease(asked)
        try:
            asking = lease.replica.session.request(
                request.method, _url(request), headers=_headers(request), data=body or None, allow_redirects=False
            )
            answer = await unless_client_leaves(request, asking, 0)
        except aiohttp.ClientError as error:
            lease.close()
            raise lease.failure() from error
        except BaseException:  # the client left, or the server ends
            lease.close()
            raise
        return _PassedOn(answer, lease)


def _asked(body: bytes) -> Asked:
    try:
        return asked_of(parse_json(body))
    except (ValueError, RecursionError):  # its replica reports the error
        return Asked("", 0, 0)


def _url(request: Request) -> Any:
    from yarl import URL  # aiohttp's

    query = request.scope["query_string"].decode("latin-1")
    path = request.scope.get("raw_path", request.scope["path"].encode()).decode("latin-1")
    return URL(f"http://replica{path}{'?' if query else ''}{query}", encoded=True)


def _headers(request: Request) -> list[tuple[str, str]]:
    passed = [(name, value) for name, value in request.headers.raw if name.lower() not in _NOT_ASKED]
    own = [(b"x-request-id", request.state.request_id.encode())]
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in (*passed, *own)]


class _PassedOn(Response):
    """The answer of a replica, part by part. Its end, or a closed connection of the client, closes the replica's
    connection and the lease.
    """

    def __init__(self, answer: aiohttp.ClientResponse, lease: Lease):
        super().__init__(status_code=answer.status)
        self._answer, self._lease = answer, lease
        self.raw_headers = [
            (name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _NOT_ANSWERED
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        await send_until_left(self._send_all(send), receive, self._close)

    def _close(self) -> None:
        self._answer.close()
        self._lease.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._answer.content.iter_any():
                self._lease.progress(part.count(b"data: "))
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except aiohttp.ClientError:
            if not self._answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            error = self._lease.failure()
            told = to_json(error_body(error.status_code, str(error.detail)), ensure_ascii=False)
            await send({"type": "http.response.body", "body": f"data: {told}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
