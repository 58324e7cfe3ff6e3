"""The web application: endpoints, errors, the page."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from ee_tuning import __version__
from ee_tuning.errors import InputError
from ee_tuning.openai_protocol.api_errors import ApiError, error_body
from ee_tuning.openai_protocol.openapi import tell_true_answers
from ee_tuning.openai_protocol.responses import ClientLeft, ErrorJson
from ee_tuning.serving.access import Access
from ee_tuning.serving.completions_api import CompletionsApi
from ee_tuning.serving.engine_client import EngineClient
from ee_tuning.serving.information_api import InformationApi
from ee_tuning.serving.metrics import Metrics
from ee_tuning.serving.request_jobs import RequestJobs
from ee_tuning.serving.settings import ServeSettings
from ee_tuning.serving.tracing import Tracing

_PAGE = Path(__file__).parent / "page"
_TYPES = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""The page loads nothing from elsewhere, and runs no text as a script."""


def build_app(
    client: EngineClient,
    jobs: RequestJobs,
    metrics: Metrics,
    model_names: tuple[str, ...],
    settings: ServeSettings,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Builds the app for one model."""
    app = FastAPI(title="ee_tuning", version=__version__, root_path=settings.root_path)
    app.state.max_body_bytes = settings.max_body_bytes
    completions = CompletionsApi(client, jobs, metrics, model_names, settings.request_timeout, tracing)
    app.include_router(completions.router)
    app.include_router(InformationApi(client, jobs, metrics, completions, model_names).router)
    for path, name in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(name), methods=["GET"], include_in_schema=False)
    add_error_handlers(app)
    tell_true_answers(app)
    add_access(app, settings)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Makes the app answer every error in OpenAI's form."""
    for kind, handler in (
        (InputError, _refused),
        (ApiError, _api_error),
        (StarletteHTTPException, _http_error),
        (RequestValidationError, _invalid),
        (ClientLeft, _left),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)


def add_access(app: FastAPI, settings: ServeSettings) -> None:
    """Adds the check of API keys and, for browsers, of their pages' origins."""
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Access, api_keys=settings.api_keys)


def _file(name: str) -> Any:
    async def show() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return FileResponse(_PAGE / name, media_type=_TYPES[name], headers=headers)

    return show


async def _refused(_: Request, error: Exception) -> Response:
    return ErrorJson(error_body(400, str(error)), 400)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return ErrorJson(error.body, error.status_code, headers=dict(error.headers or {}))


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers errors of the framework: an unknown path, or another method."""
    assert isinstance(error, StarletteHTTPException | HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        what = f"{request.method} {request.url.path[:100]}"
        message = f"an endpoint must be one of those that /docs lists, and there is no {what}; see /docs"
    return ErrorJson(error_body(error.status_code, message), error.status_code, headers=dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> Response:
    """Answers with the first error of a body."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    first = errors[0]
    context, place = first.get("ctx", {}), [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "refused":
        return ErrorJson(error_body(400, context["message"], context["param"]), 400)
    kind = request.headers.get("content-type", "")
    if not place and "json" not in kind.lower():
        message = f"a body must be JSON with Content-Type: application/json, got {kind[:60]!r}; send that header"
        return ErrorJson(error_body(415, message), 415)
    if not place:
        return ErrorJson(error_body(400, "a body must be a JSON object, got none; send one"), 400)
    given, of_field = first.get("input"), [each for each in errors if each["loc"][:2] == first["loc"][:2]]
    # A field with several types has an error for each of them.
    reasons = dict.fromkeys(each["msg"].removeprefix("Input should be ").partition(", unable")[0] for each in of_field)
    reason = " or ".join(reasons)
    reason = f"it must be {reason}" if reason != first["msg"] else reason[:1].lower() + reason[1:]
    got = "" if first["type"] == "missing" or isinstance(given, dict) else f", got {given!r:.60}"
    message = f"{place[0]} can not be used: {reason}{got}; /docs lists types"
    return ErrorJson(error_body(400, message, place[0]), 400)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the answer has no reader


async def _failed(_: Request, __: Exception) -> Response:
    return ErrorJson(error_body(500, "the server failed; its log says why"), 500)
