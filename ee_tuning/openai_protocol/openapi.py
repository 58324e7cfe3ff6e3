"""The OpenAPI document: derived by the framework, with the true answers and errors added."""

from typing import Any

from fastapi import FastAPI

from ee_tuning.openai_protocol.answer_schemas import answer_content

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
NEVER_ANSWERED = ("/v1/embeddings",)
"""Endpoints that always refuse."""
_STATUSES = {
    "400": "The request can not be done.",
    "401": "The API key is missing.",
    "404": "There is no such model.",
    "408": "It took too long.",
    "413": "The body is too large.",
    "415": "The body is not declared as JSON.",
    "429": "The queue is full.",
    "500": "The server failed.",
    "503": "The server is ending.",
}


def tell_true_answers(app: FastAPI) -> None:
    """Adds the content of answers, and replaces the framework's 422, which never occurs, by the errors that do."""
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = derive()
            document["components"]["schemas"]["Error"] = _ERROR
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path in NEVER_ANSWERED:
                        del operation["responses"]["200"]
                    else:
                        operation["responses"]["200"]["content"] = answer_content(path)
                    for status, description in _STATUSES.items():
                        operation["responses"][status] = {"description": description, "content": content}
            app.openapi_schema = document
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
