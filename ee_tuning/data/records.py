"""The content of a JSON line, a table's row or an array's element: a text, a chat, or a prompt with its completion.

The forms are those of common tools: `text`; OpenAI's `messages`; ShareGPT's `conversations`; Alpaca's `instruction`,
`input` and `output`; `prompt` with `completion` or `response`, as texts or as two lists of messages. Records without
content are left out, and counted.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ee_tuning.data.messages import MESSAGES, Where, chat_messages, check_characters
from ee_tuning.errors import InputError

SHAREGPT = ("conversations", "conversation")
_COMPLETIONS = ("completion", "response")
_ALPACA = ("instruction", "input", "output", "system", "history")
_FINISH_REASON, _CUT = "finish_reason", "length"
KEYS = (MESSAGES, *SHAREGPT, "prompt", *_COMPLETIONS, *_ALPACA, "tools", _FINISH_REASON)
"""Columns with content beside that of a text."""
_FIRST_KEYS = (MESSAGES, *SHAREGPT, "prompt", "instruction")
_FORMS = "messages, conversations, instruction with output, or prompt with completion"


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat."""

    messages: list[dict[str, Any]]
    """Each has a role and a content, which is a text."""
    tools: list[Any] | None
    """Tools that the assistant may call, as the chat template takes them."""
    where: Where
    """Its place, for error messages."""
    num_given: int = 0
    """Number of messages at the beginning that are given: the assistant's words in them are not learned."""
    is_cut: bool = False
    """Whether the last message was cut off, so that its end is not learned."""


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, of which only the completion is learned."""

    prompt: str
    completion: str
    where: Where
    """Its place, for error messages."""
    as_chat: Conversation | None = None
    """The same as a chat, for tokenizers with a chat template."""
    is_cut: bool = False
    """Whether the completion was cut off, so that its end is not learned."""


Document = str | Conversation | Completion


class LeftOut(NamedTuple):
    """A record that teaches nothing."""

    reason: str
    where: Where


def mentions_records(head: bytes, text_key: str) -> bool:
    """Whether the beginning of a file names a key of records. Folders hold other JSON files and tables, too."""
    return any(key.encode() in head for key in (text_key, *_FIRST_KEYS))


def document_of(record: Any, text_key: str, where: Where) -> Document | LeftOut:
    """Parses `record`. `text_key` is the key of a text and takes precedence over other forms.

    A `finish_reason` of length says that the last answer was cut off. Raises InputError, with its place, where the
    record has no known form.
    """
    document = _document_of(record, text_key, where)
    if isinstance(document, str | LeftOut) or record.get(_FINISH_REASON) != _CUT:
        return document
    if isinstance(document, Completion) and document.as_chat:
        document = replace(document, as_chat=replace(document.as_chat, is_cut=True))
    return replace(document, is_cut=True)


def _document_of(record: Any, text_key: str, where: Where) -> Document | LeftOut:
    if not isinstance(record, dict):
        raise InputError(
            f'{where()}: a line must be a JSON object, got {type(record).__name__}; write {{"{text_key}": "…"}}, or name '
            "the file .json where all of it is one array"
        )
    if record.get(text_key) is not None:
        return _text(record[text_key], text_key, where) or LeftOut("empty text", where)
    for key in (MESSAGES, *SHAREGPT):
        if record.get(key) is not None:
            return _conversation(record, key, where)
    completion = next((key for key in _COMPLETIONS if record.get(key) is not None), None)
    if completion and record.get("prompt") is not None:
        return _completion(record, completion, where)
    if record.get("instruction") is not None and record.get("output") is not None:
        return _alpaca(record, where)
    if (
        any(key in record for key in (text_key, MESSAGES, *SHAREGPT, *_COMPLETIONS))
        or {"instruction", "output"} <= record.keys()
    ):
        return LeftOut("null instead of a text", where)
    known = ", ".join(map(repr, record)) or "none"
    raise InputError(
        f"{where()}: no key {text_key!r}, and no {_FORMS}; its keys are {known}; set data.text_key to that of the text"
    )


def _text(value: Any, key: str, where: Where) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where()}: {key!r} must be a text, got {type(value).__name__}; mend it, or set data.text_key"
        )
    check_characters(value, key, where)
    return value


def _conversation(record: dict[str, Any], key: str, where: Where) -> Conversation | LeftOut:
    messages = chat_messages(record[key], key, where)
    if not messages:
        return LeftOut(f"empty {key}", where)
    if record.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(record["system"], "system", where)}, *messages]
    return Conversation(messages, _tools(record, where), where)


def _completion(record: dict[str, Any], key: str, where: Where) -> Document | LeftOut:
    if isinstance(record["prompt"], list) or isinstance(record[key], list):
        prompt, said = (chat_messages(record[each], each, where) for each in ("prompt", key))
        return (
            Conversation([*prompt, *said], _tools(record, where), where, num_given=len(prompt))
            if said
            else _nothing_said(key, where)
        )
    prompt_text, completion = _text(record["prompt"], "prompt", where), _text(record[key], key, where)
    return Completion(prompt_text, completion, where) if completion else _nothing_said(key, where)


def _alpaca(record: dict[str, Any], where: Where) -> Document | LeftOut:
    system, task, given, output = (
        _text(record.get(key) or "", key, where) for key in ("system", "instruction", "input", "output")
    )
    if not output:
        return _nothing_said("output", where)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in record.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InputError(
                f"{where()}: 'history' must be pairs of an instruction and its output, got {turn!r}"[:300] + "; mend it"
            )
        said = zip(("user", "assistant"), turn, strict=True)
        messages += [{"role": role, "content": _text(text, "history", where)} for role, text in said]
    messages.append({"role": "user", "content": "\n".join(part for part in (task, given) if part)})
    chat = Conversation([*messages, {"role": "assistant", "content": output}], None, where)
    return Completion("".join(message["content"] + "\n" for message in messages), output, where, chat)


def _nothing_said(key: str, where: Where) -> LeftOut:
    return LeftOut(f"empty {key}", where)


def _tools(record: dict[str, Any], where: Where) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):  # ShareGPT's files hold them as JSON within the text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where()}: 'tools' must be a list, or JSON of one: {error}; mend or remove it"
            ) from error
    check_characters(json.dumps(tools, ensure_ascii=False, default=str), "tools", where)
    return tools if isinstance(tools, list) else None
