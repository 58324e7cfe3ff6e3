"""The grammar of required calls, in every form in which models write them."""

import json
import random
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer

from ee_tuning.errors import InputError
from ee_tuning.openai_protocol.tool_calls import form_with_calls, tool_use
from ee_tuning.openai_protocol.tool_formats import FORMATS, ToolCallReader
from ee_tuning.sampling.grammar import Grammars
from ee_tuning.sampling.structured_output import StructuredOutput

pytest.importorskip("llguidance", reason="pip install 'ee_tuning[structured]'")
jsonschema = pytest.importorskip("jsonschema")

SCHEMAS: dict[str, dict[str, Any]] = {
    "f.1": {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/n"}, "q": {"type": "string", "maxLength": 4}},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "array", "items": {"enum": [1, -2.5, "</tool_call>", "}"]}, "maxItems": 2}},
    },
    "f_2": {"type": "object", "properties": {"x": {"const": None}}, "required": ["x"], "additionalProperties": False},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": each}} for name, each in SCHEMAS.items()
]


@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>")], ids=["text", "tokens"])
@pytest.mark.parametrize("parser", FORMATS)
def test_whatever_the_grammar_allows_is_read_as_valid_calls(tmp_path, parser, marks):
    """A grammar of other calls than those that the parser reads; marks as text where the model has tokens of them."""
    tokenizer = write_byte_tokenizer(tmp_path, *marks)
    special = dict(enumerate(marks, VOCABULARY))
    grammars = Grammars(tokenizer, VOCABULARY + len(marks), (END,))
    use = tool_use(TOOLS, "required", None, parser)
    form = form_with_calls(use, None, special)
    assert form is not None and use is not None
    seen = set()
    for seed in range(12):
        rng, tokens, state = random.Random(seed), list[int](), grammars.begin(form, 0, frozenset((END,)))
        while not (tokens and (tokens[-1] == END or state.ends_with(tokens))):
            allowed = state.allowed(tokens, len(tokens))
            assert allowed is not None
            ids = allowed.nonzero()[:, 0].tolist()
            tokens.append(END if END in ids and rng.random() < 0.7 else rng.choice(ids))
        reader = ToolCallReader(use.form, use.names)
        text = tokenizer.decode([token for token in tokens if token != END], skip_special_tokens=False)
        deltas = reader.push(text) + reader.finish()
        assert all(delta.call is not None for delta in deltas), (text, deltas)
        calls = [delta.name for delta in deltas if delta.name]
        for place, name in enumerate(calls):
            arguments = "".join(delta.text for delta in deltas if delta.call == place)
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        seen |= {*calls, len(calls)}
    assert {"f.1", "f_2", 1} < seen


def call(name: str, arguments: Any, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {json.dumps(arguments)}}}'


A, B, WRONG, OTHER = call("f.1", {"x": [1]}), call("f_2", {"x": None}), call("f_2", {"x": 1}), call("g", {})
FREE = call("f.1", {"y": 2})
STRICT: dict[str, tuple[str, bool | None, bool]] = {
    "": ("hermes", None, True),
    "1 < 2 <tool": ("hermes", None, True),
    f"So:\n<tool_call>\n{B}\n</tool_call>\nand<tool_call>\n{FREE}\n</tool_call>.": ("hermes", None, True),
    f"<tool_call>\n{WRONG}\n</tool_call>": ("hermes", None, False),
    f"So: <tool_call>\n{OTHER}\n</tool_call>": ("hermes", None, False),
    f"1 <tool_call>\n{B}\n</tool_call>": ("hermes", False, True),
    f"2 <tool_call>\n{B}\n</tool_call><tool_call>\n{B}\n</tool_call>": ("hermes", False, False),
    f"1 {WRONG}": ("llama3_json", None, True),
    call("f_2", {"x": None}, "parameters"): ("llama3_json", None, True),
    call("f_2", {"x": 1}, "parameters"): ("llama3_json", None, False),
}


@pytest.mark.parametrize("text", STRICT)
@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>")], ids=["text", "tokens"])
def test_a_strict_function_is_called_strictly_beside_text(tmp_path, text, marks):
    """A function whose parameters are held where it has to be called, and not where the model may call it; text that
    is refused; a second call where one is allowed.
    """
    parser, is_parallel, is_valid = STRICT[text]
    tokenizer = write_byte_tokenizer(tmp_path, *marks)
    strict = {"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}
    use = tool_use([TOOLS[0], strict], None, is_parallel, parser)
    form = form_with_calls(use, None, dict(enumerate(marks, VOCABULARY)))
    assert form is not None
    state = Grammars(tokenizer, VOCABULARY + len(marks), (END,)).begin(form, 0, frozenset((END,)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    allowed = state.allowed(ids, len(ids))
    assert is_valid == (state.num_allowed(ids) == len(ids) and (state.ends_with(ids) or bool(allowed[END])))


def test_a_form_that_looks_like_a_call_is_refused():
    """An answer in its form that no grammar can begin, since all of it that begins like a call has to be one."""
    use = tool_use(TOOLS, "auto", None, "llama3_json")
    with pytest.raises(InputError, match="can not be told from calls of the form llama3_json"):
        form_with_calls(use, StructuredOutput(json_object=True), {})
    assert form_with_calls(use, None, {}) is None
