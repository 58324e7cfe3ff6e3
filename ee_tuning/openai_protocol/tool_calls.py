"""Functions that a chat may call: the request's tools, and the form of answers with calls."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.openai_protocol.tool_formats import FORMATS, ToolFormat
from ee_tuning.sampling.structured_output import StructuredOutput, bounded_schema

MOST_TOOLS = 128
"""OpenAI's limit."""
_NAME = re.compile(r"[\w.-]{1,64}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call."""

    tools: tuple[dict[str, Any], ...]
    """The request's tools, unchanged."""
    form: ToolFormat
    is_required: bool = False
    """Whether the answer is a call."""
    is_named: bool = False
    """Whether the request names the function."""
    is_parallel: bool = True
    """Whether there may be several calls."""

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def is_strict(self) -> bool:
        """Whether a call has to satisfy its function's parameters."""
        return self.is_required or any(tool["function"].get("strict") is True for tool in self.tools)


def tool_use(
    tools: list[dict[str, Any]] | None, choice: Any, is_parallel: bool | None, parser: str | None
) -> ToolUse | None:
    """Returns the tool use of a request; None without calls. `parser` is a name of FORMATS.

    Raises InputError on invalid tools and choices, and where calls could not be parsed.
    """
    if not tools:
        if choice not in (None, "none"):
            raise InputError(f"tool_choice needs tools, got {choice!r:.80} without any; give tools, or leave it out")
        return None
    _check_tools(tools)
    if choice == "none":
        return None
    if choice in (None, "auto"):
        if parser is None:
            raise InputError(
                'tool_choice "auto" needs to know how the model writes calls; start the server with --tool-call-parser '
                f'({", ".join(FORMATS)}), or ask for tool_choice "required" or "none"'
            )
        return ToolUse(tuple(tools), FORMATS[parser], is_parallel=is_parallel is not False)
    form = FORMATS[parser or "hermes"]
    if choice == "required":
        return ToolUse(tuple(tools), form, is_required=True, is_parallel=is_parallel is not False)
    name = choice.get("function", {}).get("name") if _is_function(choice) else None
    of_name = [tool for tool in tools if tool["function"]["name"] == name]
    if not of_name:
        known = ", ".join(tool["function"]["name"] for tool in tools)
        raise InputError(
            f"tool_choice must be none, auto, required, or name one of {known}, got {choice!r:.80}; mend it"
        )
    return ToolUse(tuple(of_name[:1]), form, is_required=True, is_named=True, is_parallel=False)


def _check_tools(tools: list[dict[str, Any]]) -> None:
    if len(tools) > MOST_TOOLS:
        raise InputError(f"tools must be at most {MOST_TOOLS}, got {len(tools)}; give those that the chat needs")
    for tool in tools:
        function = tool.get("function") if _is_function(tool) else None
        if function is None or not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
            raise InputError(
                'a tool must be {"type": "function", "function": {"name": …, "parameters": …}} with a name of up to 64 letters, '
                f"digits, _, - and ., got {tool!r:.80}; mend it"
            )
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise InputError(f"parameters of a tool must be a JSON schema, got {function['parameters']!r:.80}; mend it")
    names = [tool["function"]["name"] for tool in tools]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"tools must have names of their own, got {double} twice; rename one")


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict)


def form_with_calls(
    use: ToolUse | None, answer: StructuredOutput | None, special: Mapping[int, str]
) -> StructuredOutput | None:
    """Returns the form of an answer: only calls where one is required; otherwise `answer` or calls; text and calls
    where a function is strict.

    `special` holds the special tokens. Raises InputError where `answer` and calls can not be distinguished.
    """
    if use is None or (answer is None and not use.is_strict):
        return answer
    if answer is not None and (use.is_required or answer.name not in ("json", "json_object")):
        raise InputError(
            f"{answer.name} can not be the answer's form where a call may be it; leave it or tool_choice out"
        )
    if answer is not None and not use.form.begin:
        raise InputError(
            f"response_format can not be told from calls of the form {use.form.name}; leave it or tools out, or ask for "
            'tool_choice "none" or "required"'
        )
    if answer is not None:
        whole = f"start: calls | answer\nanswer: %json {answer.schema}"
    else:
        whole = "start: calls" if use.is_required else _text_and_calls(use, special)
    rules = _grammar_of_calls(use, special, frees_others=answer is None and not use.is_required)
    return StructuredOutput(grammar=f"{whole}\n{rules}")


def _text_and_calls(use: ToolUse, special: Mapping[int, str]) -> str:
    """Returns rules for any text in which calls, once begun, are those of the functions."""
    form, text = use.form, "TEXT: /(.|\\n)+/"
    if not form.begin:
        return "start: (TEXT | calls)?\nTEXT: /[^{](.|\\n)*/"
    if form.begin in special.values():
        return f"start: TEXT? (call TEXT?){'*' if use.is_parallel else '?'}\n{text}"
    # A lazy rule ends with the mark; after it only the call may follow.
    whole = "start: (head rest)* TEXT?" if use.is_parallel else "start: head rest | TEXT?"
    return f"{whole}\n{text}\nhead[lazy]: /(.|\\n)*/ {to_json(form.begin)}"


def _grammar_of_calls(use: ToolUse, special: Mapping[int, str], *, frees_others: bool) -> str:
    """Returns rules for `calls`, in llguidance's Lark
    (https://github.com/guidance-ai/llguidance/blob/main/docs/toolcalls.md). With `frees_others` functions that are not
    strict take any object.
    """
    form, rules = use.form, list[str]()
    begin, end = (_said(mark, special) for mark in (form.begin, form.end))
    more = f" ({to_json(form.separator, ensure_ascii=False)} call)*" if use.is_parallel else ""
    line = ' "\\n" ' if form.begin else " "
    choices = " | ".join(f"call_{i}" for i in range(len(use.tools)))
    rules += [f"calls: call{more}", f"call: {begin} rest", f"rest: {line}({choices}){line}{end}"]
    for i, tool in enumerate(use.tools):
        function = tool["function"]
        head = f'{{"name": {to_json(function["name"])}, "{form.arguments}": '
        is_free = frees_others and function.get("strict") is not True
        schema = {"type": "object"} if is_free else function.get("parameters") or _NO_PARAMETERS
        rules += [f'call_{i}: {to_json(head, ensure_ascii=False)} arguments_{i} "}}"']
        rules += [f"arguments_{i}: %json {bounded_schema(schema)}"]
    return "\n".join(rules)


def _said(mark: str, special: Mapping[int, str]) -> str:
    """Returns a mark for a grammar: a token, if the mark is a special one."""
    token = next((token for token, text in special.items() if text == mark), None)
    if token is not None:
        return f"<[{token}]>"
    return to_json(mark) if mark else ""


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages with the arguments of calls as objects, as chat templates expect. A client sends them as
    text.

    Raises InputError on invalid calls.
    """
    made = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if calls and not isinstance(calls, list):
            raise InputError(f"tool_calls of a message must be a list, got {calls!r:.80}; mend it")
        made.append(message if not calls else {**message, "tool_calls": [_for_template(call) for call in calls]})
    return made


def _for_template(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if function is None or not isinstance(function.get("name"), str) or not isinstance(arguments, str | dict | None):
        raise InputError(
            f'a call in tool_calls must have {{"function": {{"name": …, "arguments": "…"}}}}, got {call!r:.80}; mend it'
        )
    try:
        read = json.loads(arguments or "{}") if not isinstance(arguments, dict) else arguments
    except (ValueError, RecursionError) as error:
        raise InputError(f"arguments of a call must be JSON, got {arguments!r:.80}: {error}; mend them") from error
    return {**call, "function": {**function, "arguments": read}}
