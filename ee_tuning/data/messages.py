"""Normalizes messages of a chat, as files have them, to messages with a role and a text."""

import json
from collections.abc import Callable
from typing import Any

from ee_tuning.errors import InputError

MESSAGES = "messages"
Where = Callable[[], str]
"""Returns a place such as file and line, which is computed only on demand."""
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""ShareGPT's names of roles that differ."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def chat_messages(messages: Any, key: str, where: Where) -> list[dict[str, Any]]:
    """Returns `messages`, the value of `key`, with role and text: parts of text are joined, and null becomes empty.

    Raises InputError, with its place, where they are no such list, or hold more than text.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # tables hold lists as JSON
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where()}: {key!r} must be a list of messages: {error}; mend or remove it") from error
    if not isinstance(messages, list):
        raise InputError(
            f"{where()}: {key!r} must be a list of messages, got {messages!r}"[:300] + "; mend or remove it"
        )
    # Roles, names and tool calls, too. .parquet may have values that JSON lacks.
    check_characters(json.dumps(messages, ensure_ascii=False, default=str), key, where)
    return [_message(message, key, where) for message in messages]


def _message(message: Any, key: str, where: Where) -> dict[str, Any]:
    role = content = None
    if isinstance(message, dict):
        speaker = message.get("from")
        role = message.get("role") or (_SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None)
        content = message["value"] if message.get("content") is None and "value" in message else message.get("content")
    if not isinstance(role, str):
        raise InputError(
            f"{where()}: each of {key!r} must be an object with role and content, or from and value, got {message!r}"[
                :300
            ]
            + "; mend or remove it"
        )
    # .parquet has a value for each key that any message has; templates test whether a key is present.
    others = {
        name: value
        for name, value in message.items()
        if value is not None and name not in ("role", "content", "from", "value")
    }
    return {"role": role, "content": _text_of(content, key, where), **others}


def _text_of(content: Any, key: str, where: Where) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(
            f"{where()}: a content in {key!r} must be a text, got {type(content).__name__}; write it as a text, or remove it"
        )
    return "\n".join(_text_of_part(part, key, where) for part in content)


def _text_of_part(part: Any, key: str, where: Where) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    text = part.get("text") if isinstance(part, dict) else part
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        what = repr(kind) if kind not in _TEXT_PARTS else type(text).__name__
        raise InputError(
            f"{where()}: a content in {key!r} has a part of {what}, and only text is supported; remove the part, or the chat"
        )
    return text


def check_characters(text: str, key: str, where: Where) -> None:
    """Raises InputError, naming the key and its place, where `text` can not be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where()}: {key!r} holds half of a surrogate pair, which is no character; mend or remove it"
        ) from error
