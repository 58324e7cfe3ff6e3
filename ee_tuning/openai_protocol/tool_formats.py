"""Parses tool calls from a model's text as it is generated.

Hermes and Qwen write `<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>` for each call, anywhere in an answer;
Llama 3 writes `{"name": …, "parameters": {…}}` as its whole answer, several with semicolons between them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ee_tuning.generation.text import overlap

_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolFormat:
    """A format of calls."""

    name: str
    begin: str
    """Text in front of each call; empty where calls are the whole answer."""
    end: str
    separator: str
    """Text between two calls."""
    arguments: str
    """The key of the arguments."""
    dropped: tuple[str, ...] = ()
    """Tokens before the first call that are ignored."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that mark calls."""
        return (self.begin, self.end, *self.dropped)


FORMATS = {
    "hermes": ToolFormat("hermes", "<tool_call>", "</tool_call>", "\n", "arguments"),
    "llama3_json": ToolFormat("llama3_json", "", "", "; ", "parameters", ("<|python_tag|>",)),
}
"""The formats by their names for --tool-call-parser, which are vLLM's."""


class Delta(NamedTuple):
    """A part of an answer."""

    text: str
    """Content; with a `call`, a part of its arguments."""
    call: int | None = None
    """The number of the call among those of the answer."""
    name: str = ""
    """The function's name, with the first delta of a call."""


class ToolCallReader:
    """Parses one answer, given whole or in parts. Its deltas add up to the same message."""

    def __init__(self, form: ToolFormat, known: frozenset[str]):
        """`known` are names of functions. Where calls have no marks, an object of another name is text."""
        self._form, self._known = form, known
        self._held = ""
        """Text that may begin a call, or be white space before one."""
        self._object: _CallObject | None = None
        self._is_plain = False
        """Whether the answer is text, because it did not begin as a call."""
        self.num_calls = 0

    def push(self, text: str) -> list[Delta]:
        """Parses more text, and returns its deltas."""
        return list(self._read(text))

    def finish(self) -> list[Delta]:
        """Ends the answer, and returns the deltas of held-back text."""
        deltas = list(self._end_of_object()) if self._object is not None else []
        held, self._held = self._held, ""
        if held and (held.strip() or not self.num_calls):
            deltas.append(Delta(held))
        return deltas

    def _read(self, text: str) -> Iterator[Delta]:
        while text:
            if self._object is None:
                self._held += text
                text = ""
                yield from self._find_call()
                if self._object is not None:
                    text, self._held = self._held, ""
            else:
                count = self._object.take(text)
                text = text[count:]
                yield from self._call_deltas()
                if self._object.is_done or self._object.is_broken:
                    yield from self._end_of_object()

    def _find_call(self) -> Iterator[Delta]:
        """Yields the text before the next call. If a call begins, its object starts in `_held`."""
        if not self._form.begin:
            yield from self._find_bare_call()
            return
        if self.num_calls:  # the rest of the previous call
            behind = self._held.lstrip()
            if behind.startswith(self._form.end):
                self._held = behind[len(self._form.end) :]
            elif self._form.end.startswith(behind):
                return
        at = self._held.find(self._form.begin)
        if at >= 0:
            if content := self._held[:at].rstrip():
                yield Delta(content)
            self._held = self._held[at + len(self._form.begin) :]
            self._object = _CallObject(self._form.begin)
            return
        keep = len(self._held) - overlap(self._held, self._form.begin)
        keep = len(self._held[:keep].rstrip())
        if keep:
            yield Delta(self._held[:keep])
            self._held = self._held[keep:]

    def _find_bare_call(self) -> Iterator[Delta]:
        said = self._held.lstrip(" \n\r\t;" if self.num_calls else " \n\r\t")
        for mark in self._form.dropped:
            said = said.removeprefix(mark).lstrip()
            if said and mark.startswith(said):
                return
        if said.startswith("{") and not self._is_plain:
            self._held, self._object = said, _CallObject("")
        elif said:
            self._is_plain = True
            held, self._held = self._held, ""
            yield Delta(held)

    def _call_deltas(self) -> Iterator[Delta]:
        """Yields the deltas of a call's object."""
        call = self._object
        assert call is not None
        if call.name is None or not call.has_arguments or (not self._form.begin and call.name not in self._known):
            return
        if call.number is None:
            call.number, self.num_calls = self.num_calls, self.num_calls + 1
            yield Delta("", call.number, call.name)
        if more := call.new_arguments():
            yield Delta(more, call.number)

    def _end_of_object(self) -> Iterator[Delta]:
        call, self._object = self._object, None
        assert call is not None
        if call.number is None and call.is_done and call.name is not None and self._form.begin:
            call.number, self.num_calls = self.num_calls, self.num_calls + 1
            yield Delta("", call.number, call.name)
            yield Delta("{}", call.number)
        elif call.number is None:
            self._is_plain = True
            yield Delta(call.text)


class _CallObject:
    """The JSON object of one call, character by character. It may be invalid JSON, since the model writes it."""

    def __init__(self, mark: str):
        """`mark` is the text in front of it."""
        self.text = mark
        self.number: int | None = None
        """Its number among the calls, once it is one."""
        self.name: str | None = None
        self.has_arguments = self.is_done = self.is_broken = False
        self._depth, self._in_string, self._is_escaped, self._is_value = 0, False, False, False
        self._key, self._part, self._arguments, self._num_told = "", "", "", 0

    def take(self, text: str) -> int:
        """Reads up to the end of the object, and returns the number of characters read."""
        for count, letter in enumerate(text):
            if self.is_done or self.is_broken:
                return count
            self.text += letter
            self._take(letter)
        return len(text)

    def new_arguments(self) -> str:
        """Returns the part of the arguments' text that was not returned before."""
        known = self._arguments or self._part.lstrip()
        if self._depth <= 1 and not self._in_string:
            known = known.rstrip()
        more, self._num_told = known[self._num_told :], max(self._num_told, len(known))
        return more

    def _take(self, letter: str) -> None:
        if self._in_string:
            self._part += letter
            self._in_string = letter != '"' or self._is_escaped
            self._is_escaped = letter == "\\" and not self._is_escaped
        elif self._depth == 0:
            self.is_broken = letter not in " \n\r\t{"
            self._depth = int(letter == "{")
        elif letter in "}]" and self._depth == 1:
            self._end_value()
            self.is_done, self._depth = True, 0
        elif letter == "," and self._depth == 1:
            self._end_value()
        elif letter == ":" and self._depth == 1 and not self._is_value:
            self._key, self._part, self._is_value = _text_of(self._part) or "", "", True
        else:
            self._in_string = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
            self._part += letter
        self.has_arguments = self.has_arguments or (
            self._is_value and self._key in _ARGUMENTS and bool(self._part.strip())
        )

    def _end_value(self) -> None:
        if self._is_value and self._key == "name":
            self.name = _text_of(self._part)
        elif self._is_value and self._key in _ARGUMENTS:
            self._arguments = self._part.strip()
        self._part, self._is_value = "", False


def _text_of(part: str) -> str | None:
    try:
        value = json.loads(part)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
