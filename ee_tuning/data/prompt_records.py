"""The prompts of records, without their answers, for `ee-tuning regenerate`.

Every form that `records.py` reads is a prompt, with or without answers. A chat asks for an answer wherever the
assistant spoke, and at its end if another role spoke last.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ee_tuning.data.chat import ASSISTANT
from ee_tuning.data.messages import MESSAGES, Where
from ee_tuning.data.records import KEYS, SHAREGPT, Completion, Conversation, LeftOut, document_of
from ee_tuning.errors import InputError

Message = dict[str, Any]
_TEXT, _USER = "text", "user"
_TOOL_ROLES = ("tool", "function", "ipython")
_ANSWER = "?"
"""Placeholder for an answer, where a form needs one."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A record without its answers."""

    turns: tuple[list[Message], ...] = ()
    """Messages of a chat before each answer, without those before an earlier answer. Empty for a text."""
    text: str = ""
    """The text to continue."""
    is_own: bool = False
    """Whether the model has to write the prompt first: a user's message in a chat."""
    tools: list[Any] | None = None
    is_given: bool = False
    """Whether the assistant's words among the messages are given, and not to be learned."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Keys of the record beside prompt and answer."""

    @property
    def num_answers(self) -> int:
        """Number of answers that it asks for."""
        return max(1, len(self.turns))


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The rules by which records are turned into prompts."""

    text_key: str
    """Key of a text."""
    has_template: bool
    """Whether the tokenizer has a chat template, so that instructions become chats."""
    as_chat: bool = False
    """Whether a text is a user's message in a chat."""
    last_turn: bool = False
    """Whether a chat asks only for its last answer, and the earlier ones are given."""


def prompt_of(record: Any, reading: PromptFormat, where: Where) -> Prompt | LeftOut:
    """Returns the prompt of `record`. Raises InputError, with its place, where it has no known form."""
    document = _read(record, reading.text_key, where)
    if isinstance(document, LeftOut):
        return document
    kept = _kept(record, reading.text_key)
    if isinstance(document, Completion) and document.as_chat and (reading.has_template or reading.as_chat):
        document = document.as_chat
    if isinstance(document, Conversation):
        return _chat(document, reading, kept)
    text = document if isinstance(document, str) else document.prompt
    if not text:
        return LeftOut("empty prompt", where)
    return (
        Prompt(turns=([{"role": _USER, "content": text}],), kept=kept)
        if reading.as_chat
        else Prompt(text=text, kept=kept)
    )


def _read(record: Any, text_key: str, where: Where) -> str | Completion | Conversation | LeftOut:
    """Reads `record` like `document_of`, with some answer. Precedence: chat, instruction, prompt, text."""
    if not isinstance(record, dict):
        return document_of(record, text_key, where)  # raises the error
    given = {key: value for key, value in record.items() if value is not None}
    form = {key: value for key, value in given.items() if key in KEYS and key != text_key}
    if any(key in form for key in (MESSAGES, *SHAREGPT)):
        return document_of(form, _TEXT, where)
    if "instruction" in given:
        return document_of({**form, "instruction": given["instruction"], "output": _ANSWER}, _TEXT, where)
    if "prompt" in given:
        answer = [{"role": ASSISTANT, "content": _ANSWER}] if isinstance(given["prompt"], list) else _ANSWER
        return document_of({"tools": given.get("tools"), "prompt": given["prompt"], "completion": answer}, _TEXT, where)
    if text_key in given:
        return document_of({text_key: given[text_key]}, text_key, where)
    if any(key in record for key in (text_key, "prompt", "instruction", MESSAGES, *SHAREGPT)):
        return LeftOut("null instead of a prompt", where)
    known = ", ".join(map(repr, record)) or "none"
    raise InputError(
        f"{where()}: no messages, conversations, instruction, prompt or {text_key!r}; its keys are {known}; give the key of "
        "the prompt with --text-key"
    )


def _chat(chat: Conversation, reading: PromptFormat, kept: dict[str, Any]) -> Prompt | LeftOut:
    messages = chat.messages[: chat.num_given] if chat.num_given else chat.messages
    is_given = bool(chat.num_given) or reading.last_turn
    if is_given and not chat.num_given:
        last = next((place for place in range(len(messages), 0, -1) if messages[place - 1]["role"] != ASSISTANT), 0)
        messages = messages[:last]
    if not any(message["role"] == _USER for message in messages):
        return LeftOut("chat without a user's message", chat.where)
    if is_given:
        if messages[-1]["role"] == ASSISTANT:
            return LeftOut("prompt that ends with the assistant's words", chat.where)
        has_said = any(message["role"] == ASSISTANT for message in messages)
        return Prompt(turns=(messages,), tools=chat.tools, is_given=has_said, kept=kept)
    if any(
        message["role"] in _TOOL_ROLES or message.get("tool_calls") or message.get("function_call")
        for message in messages
    ):
        return LeftOut("chat in which tools are called (their results would not be those of new calls)", chat.where)
    return Prompt(turns=tuple(_turns(messages)), tools=chat.tools, kept=kept)


def _turns(messages: list[Message]) -> Iterator[list[Message]]:
    """Returns the messages before each answer.

    The assistant's words before a user's first message are dropped, and several in a row are one answer.
    """
    before: list[Message] = []
    has_asked = False
    for message in messages:
        if message["role"] != ASSISTANT:
            before.append(message)
            has_asked |= message["role"] == _USER
        elif has_asked and before:
            yield before
            before = []
    if before:
        yield before


def _kept(record: dict[str, Any], text_key: str) -> dict[str, Any]:
    """Returns the record without the keys of prompts and answers. Values that JSON lacks, such as times, become
    texts.
    """
    names = record.keys() - {text_key, _TEXT, *KEYS}
    kept: dict[str, Any] = json.loads(json.dumps({key: record[key] for key in record if key in names}, default=str))
    return kept
