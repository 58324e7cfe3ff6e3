"""The answers with status 200 in the OpenAPI document."""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_TRUTH: Schema = {"type": "boolean"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(optional: dict[str, Schema] | None = None, **required: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


_NUMBERS_OR_NULL = _list(_or_null(_NUMBER))
_LIKELIEST = {"type": "object", "additionalProperties": _NUMBER}
_TEXT_LOGPROBS = _object(
    tokens=_list(_TEXT),
    token_logprobs=_NUMBERS_OR_NULL,
    top_logprobs=_list(_or_null(_LIKELIEST)),
    text_offset=_list(_WHOLE),
)
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_WHOLE)}
_CHAT_LOGPROBS = _object(content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))))
_OF_EXITS = {"exit_layers": _list(_WHOLE), "confidences": _list(_NUMBER), "token_ids": _list(_WHOLE)}
_CHOICE: dict[str, Schema] = {"index": _WHOLE, "finish_reason": {"enum": ["stop", "length"]}}
_CALL = _object(id=_TEXT, type=_TEXT, function=_object(name=_TEXT, arguments=_TEXT))
_USAGE = _object(
    prompt_tokens=_WHOLE,
    completion_tokens=_WHOLE,
    total_tokens=_WHOLE,
    prompt_tokens_details=_object(cached_tokens=_WHOLE),
)
_MODEL = _object(id=_TEXT, object=_TEXT, created=_WHOLE, owned_by=_TEXT, root=_TEXT, max_model_len=_WHOLE)


_EVENTS = {"description": "events whose data are chunks as OpenAI has them, then [DONE]"}


def _completion(choice: Schema) -> Schema:
    head = {"id": _TEXT, "object": _TEXT, "created": _WHOLE, "model": _TEXT}
    return _object(**head, choices=_list(choice), usage=_USAGE)


_ANSWERS: dict[str, Schema] = {
    "/v1/completions": _completion(
        _object(
            {**_OF_EXITS, "prompt_exit_layers": _list(_or_null(_WHOLE))},
            **_CHOICE,
            text=_TEXT,
            logprobs=_or_null(_TEXT_LOGPROBS),
        )
    ),
    "/v1/chat/completions": _completion(
        _object(
            _OF_EXITS,
            index=_WHOLE,
            finish_reason={"enum": ["stop", "length", "tool_calls"]},
            message=_object(
                {"tool_calls": _list(_CALL)}, role=_TEXT, content=_or_null(_TEXT), refusal={"type": "null"}
            ),
            logprobs=_or_null(_CHAT_LOGPROBS),
        )
    ),
    "/v1/models": _object(object=_TEXT, data=_list(_MODEL)),
    "/v1/models/{model}": _MODEL,
    "/v1/exits": _object(
        object=_TEXT,
        num_layers=_WHOLE,
        exit_layers=_list(_WHOLE),
        policies=_list(_TEXT),
        measures=_list(_TEXT),
        has_chat_template=_TRUTH,
        default={"type": "object"},
    ),
    "/tokenize": _object({"token_strs": _list(_TEXT)}, tokens=_list(_WHOLE), count=_WHOLE, max_model_len=_WHOLE),
    "/detokenize": _object(prompt=_TEXT),
    "/health": _object(status=_TEXT),
    "/ping": _object(status=_TEXT),
    "/ready": _object(status=_TEXT),
    "/version": _object(version=_TEXT),
}


def answer_content(path: str) -> dict[str, Any]:
    """Returns the content of an endpoint's answer, by media type."""
    if path == "/metrics":
        return {"text/plain": {"schema": _TEXT}}
    content = {"application/json": {"schema": _ANSWERS[path]}}
    return {**content, "text/event-stream": {"schema": _EVENTS}} if "completions" in path else content
