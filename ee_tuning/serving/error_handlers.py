"""Errors as answers of the server and of the front, all in OpenAI's form."""

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from ee_tuning.errors import InputError
from ee_tuning.openai_protocol.api_errors import ApiError, error_body
from ee_tuning.openai_protocol.responses import ClientLeft, ErrorJson


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
