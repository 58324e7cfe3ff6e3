"""Converts `response_format` and `structured_outputs` of a request to the engine's form."""

import re
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.sampling.structured_output import StructuredOutput, structured_output_of

_PLACE = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: ")
"""A position in a grammar that was generated and not written by the client."""
_KINDS = ("text", "json_object", "json_schema")


def answer_form(response_format: dict[str, Any] | None, structured_outputs: dict[str, Any] | None) -> Any:
    """Returns the StructuredOutput that a request asks for, or None. Raises InputError on values that can not be used,
    and if both are given.
    """
    of_format = _of_format(response_format)
    try:
        own = structured_output_of(structured_outputs)
    except InputError as error:
        raise InputError(str(error).replace("structured_output ", "structured_outputs ", 1)) from error
    if of_format is not None and own is not None:
        raise InputError("response_format and structured_outputs both give the answer's form, got both; give one")
    return of_format or own


def by_request_names(message: str, *, is_call: bool, has_format: bool) -> str:
    """Replaces a form's name in a message by the request's name for it."""
    if is_call:
        return _PLACE.sub("", message.replace("grammar of structured_output", "parameters of tools", 1))
    if has_format:
        return message.replace("json of structured_output", "the schema of response_format", 1)
    return message.replace("of structured_output ", "of structured_outputs ", 1)


def _of_format(given: dict[str, Any] | None) -> StructuredOutput | None:
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind not in _KINDS:
        raise InputError(f"response_format must have a type of {', '.join(_KINDS)}, got {kind!r:.80}; mend it")
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InputError(
            f'response_format must have {{"json_schema": {{"schema": …}}}}, got {named!r:.80}; give a schema'
        )
    return StructuredOutput(json=schema)
