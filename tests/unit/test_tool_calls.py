"""The grammar of required calls, in every form in which models write them."""

import json
import random
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer

from ee_tuning.engine.grammar import Grammars
from ee_tuning.engine.structured_output import StructuredOutput
from ee_tuning.errors import InputError
from ee_tuning.serving.tool_calls import form_with_calls, tool_use
from ee_tuning.serving.tool_formats import FORMATS, ToolCallReader

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
TOOLS = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in SCHEMAS.items()]


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


def test_a_form_that_looks_like_a_call_is_refused():
    """An answer in its form that no grammar can begin, since all of it that begins like a call has to be one."""
    use = tool_use(TOOLS, "auto", None, "llama3_json")
    with pytest.raises(InputError, match="can not be told from calls of the form llama3_json"):
        form_with_calls(use, StructuredOutput(json_object=True), {})
    assert form_with_calls(use, None, {}) is None
