"""Calls of functions in the text of answers, whole and in parts of any length."""

import json
import random
from typing import Any

import pytest

from ee_tuning.openai_protocol.tool_formats import FORMATS, ToolCallReader

A = '{"name": "add", "arguments": {"x": [1, "}{\\"<"], "y": {"z": null}}}'
A_ARGUMENTS = '{"x": [1, "}{\\"<"], "y": {"z": null}}'
LAST = '{"arguments": {"q": "a:b,"}, "name": "find"}'
LLAMA = '{"name": "add", "parameters": {"x": 1}}'

ANSWERS: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    "a call": ("hermes", f"<tool_call>\n{A}\n</tool_call>", "", [("add", A_ARGUMENTS)]),
    "text and two calls": (
        "hermes",
        f"Let me see. \n\n<tool_call>{A}</tool_call>\n<tool_call>\n{LAST}\n</tool_call>\n",
        "Let me see.",
        [("add", A_ARGUMENTS), ("find", '{"q": "a:b,"}')],
    ),
    "text alone": ("hermes", "1 < 2 <tool <tool_cal  \n", "1 < 2 <tool <tool_cal  \n", []),
    "no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    "no object": ("hermes", "<tool_call> add(1) </tool_call>", "<tool_call> add(1) </tool_call>", []),
    "no end": ("hermes", f"<tool_call>\n{A}", "", [("add", A_ARGUMENTS)]),
    "cut off": ("hermes", '<tool_call>\n{"name": "add", "arguments": {"x": [1,', "", [("add", '{"x": [1,')]),
    "cut off early": ("hermes", '<tool_call>\n{"name": "ad', '<tool_call>\n{"name": "ad', []),
    "llama": ("llama3_json", f" {LLAMA}", "", [("add", '{"x": 1}')]),
    "llama, several": (
        "llama3_json",
        f"<|python_tag|>{LLAMA}; {LLAMA}",
        "",
        [("add", '{"x": 1}'), ("add", '{"x": 1}')],
    ),
    "llama, text": ("llama3_json", f"See: {LLAMA}", f"See: {LLAMA}", []),
    "llama, JSON that is no call": ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "llama, another's call": ("llama3_json", A.replace("add", "x"), A.replace("add", "x"), []),
}


def read(form: str, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolCallReader(FORMATS[form], frozenset(("add", "find", "now")))
    content, calls = "", list[Any]()
    for deltas in [*map(reader.push, parts), reader.finish()]:
        for delta in deltas:
            if delta.call is None:
                content += delta.text
            elif delta.name:
                assert delta.call == len(calls)
                calls.append((delta.name, delta.text))
            else:
                calls[delta.call] = (calls[delta.call][0], calls[delta.call][1] + delta.text)
    assert reader.num_calls == len(calls)
    return content, calls


@pytest.mark.parametrize("case", ANSWERS)
def test_calls_are_read_alike_whole_and_in_parts(case):
    """A mark that is cut in two and shown; a brace in a text that ends an object; a call that a stream has twice."""
    form, text, content, calls = ANSWERS[case]
    rng, wanted = random.Random(case), (content, calls)
    assert read(form, [text]) == wanted
    assert read(form, list(text)) == wanted
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), 5))
        assert read(form, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == wanted


def test_arguments_stream_before_the_call_ends():
    """A client that waits for the whole call to see its first argument."""
    reader = ToolCallReader(FORMATS["hermes"], frozenset())
    assert reader.push('<tool_call>{"name": "f", "arguments": {"a": "lo')[-1].text == '{"a": "lo'
    assert [delta.text for delta in reader.push("ng")] == ["ng"]
    assert json.loads('{"a": "long"}')
