"""Forms of answers and calls of functions, asked by OpenAI's own client of a running server."""

import json
import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from exits import write_exits
from pydantic import BaseModel, Field
from served import MODEL, Served, config_of, served

from ee_tuning import SamplingParams
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.openai_protocol.chat_answer import ChatAnswer
from ee_tuning.openai_protocol.schemas import ChatCompletionBody
from ee_tuning.openai_protocol.tool_calls import tool_use
from ee_tuning.sampling.policy import FULL

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
pytest.importorskip("llguidance", reason="pip install 'ee_tuning[structured]'")

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
jsonschema = pytest.importorskip("jsonschema")


TEMPLATE = (
    "{% if tools %}{% for tool in tools %}<{{ tool.function.name }}>{% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}[{{ call.function.name }} {{ call.function.arguments.x }}]{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/small"}, "how": {"enum": ["fast", "slow"]}},
    "required": ["x", "how"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 99}},
}
FIND: dict[str, Any] = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 6}, "deep": {"type": "boolean"}},
    "required": ["text"],
    "additionalProperties": False,
}
SCHEMAS = {"add": ADD, "find": FIND, "now": {"type": "object", "maxProperties": 0}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": FIND}},
    {"type": "function", "function": {"name": "now"}},
]
ASKED: dict[str, Any] = {"model": "tiny-python-llama", "messages": [{"role": "user", "content": "What is it?"}]}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "threshold": {"exit_threshold": 0.2},
    "speculative": {"policy": "speculative"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    (folder / "tools.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = config_of(exits, folder, **{"data.chat_template": str(folder / "tools.jinja"), "model.dtype": "float32"})
    with served(config, tool_call_parser="hermes") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Part(BaseModel):
    """A nested type, which schemas refer to."""

    kind: Literal["a", "b"]
    size: Annotated[int, Field(ge=0, le=50)]


class Thing(BaseModel):
    """What an answer is parsed to."""

    name: Annotated[str, Field(max_length=8)]
    parts: Annotated[list[Part], Field(max_length=2)]
    other: Part | None
    share: Literal[0, 1] | None


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_parsed_to_their_types(client, way):
    """A schema of pydantic's that is not understood, or held by the full model alone."""
    asked = {**ASKED, "response_format": Thing, "seed": 2, "n": 2, "extra_body": WAYS[way]}
    answer = client.chat.completions.parse(**asked)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Thing)
        assert choice.message.tool_calls is None


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose answers are short."""
    kinds = ["integer", "string", "boolean", "null", "enum", "pattern", "any"] + ["object", "array"] * depth
    kind = rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-500, 500)
        return {"type": kind, "minimum": low, "maximum": low + rng.randrange(900)}
    if kind == "string":
        return {"type": kind, "minLength": rng.randrange(3), "maxLength": 2 + rng.randrange(6)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "é\n", 3, None, -1.5, True, [1], {"b": "c"}], 3)}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": rng.choice(["^[a-c]{2,5}$", "^(x|yz)-[0-9]+$".replace("+", "{1,3}"), "^$"]),
        }
    if kind == "any":
        return {"anyOf": [random_schema(rng, 0), random_schema(rng, 0)]}
    if kind == "array":
        return {"type": kind, "items": random_schema(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": 2}
    if kind == "object":
        names = rng.sample(["id", 'a "quoted" one', "näme", "b", "$c"], 3)
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = rng.sample(names, rng.randrange(4))
        return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_answers_satisfy_random_schemas(client):
    """A constraint that the mask does not hold, at an exit or in a draft."""
    rng = random.Random(11)
    for place in range(24):
        schema = {"type": "object", "properties": {"v": random_schema(rng)}, "required": ["v"]}
        schema["additionalProperties"] = False
        form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        way = WAYS[rng.choice(list(WAYS))]
        answer = client.chat.completions.create(**ASKED, response_format=form, seed=place, extra_body=way)
        assert answer.choices[0].finish_reason == "stop", schema
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_other_forms_are_those_of_the_library(server, client):
    """A form of vLLM's that is not handed on, or that only chats have."""
    for form in ({"regex": "[a-z]{4}_[0-9]{2}"}, {"choice": ["def", "class"]}, {"grammar": 'start: "a"+ "b"'}):
        params = {"max_tokens": 12, "temperature": 0.7, "seed": 4}
        (wanted,) = server.reference.generate("x = ", SamplingParams(**params, structured_output=form), policy="full")
        extra = {"structured_outputs": form, "policy": "full"}
        made = client.completions.create(model="tiny-python-llama", prompt="x = ", extra_body=extra, **params)
        assert (made.choices[0].text, made.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
    made = client.completions.create(
        model="tiny-python-llama",
        prompt="x = ",
        max_tokens=300,
        seed=1,
        temperature=0.3,
        extra_body={"response_format": {"type": "json_object"}},
    )
    assert made.choices[0].finish_reason == "length" or isinstance(json.loads(made.choices[0].text), dict)


CHOICES: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "required": ({"tool_choice": "required"}, {"add", "find", "now"}, "tool_calls"),
    "one at a time": ({"tool_choice": "required", "parallel_tool_calls": False}, {"add", "find", "now"}, "tool_calls"),
    "named": ({"tool_choice": {"type": "function", "function": {"name": "find"}}}, {"find"}, "stop"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHOICES)
def test_a_call_that_is_required_is_made(client, case, way):
    """Arguments that do not satisfy the function's schema; a stream whose calls are others than the whole answer's."""
    changes, names, reason = CHOICES[case]
    asked = {**ASKED, "tools": TOOLS, "seed": 5, "n": 2, "temperature": 0.5, **changes}
    asked["max_tokens"] = 240 if case == "required" else 600  # the shipped model ends no list of calls
    whole = client.chat.completions.create(**asked, extra_body=WAYS[way])
    made: list[list[Any]] = [[], []]
    reasons = ["", ""]
    for chunk in client.chat.completions.create(**asked, extra_body=WAYS[way], stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            for call in choice.delta.tool_calls or []:
                calls = made[choice.index]
                if call.id is not None:
                    assert call.type == "function" and call.index == len(calls)
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
    for choice, streamed, why in zip(whole.choices, made, reasons, strict=True):
        calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls]
        assert (
            calls == streamed
            and "\n\n" not in "".join(each[1] for each in calls)
            and choice.message.content is None
            and calls
        )
        assert choice.finish_reason == why and why in (reason, "length")
        assert len(calls) == 1 or case == "required"
        for name, arguments in calls if why != "length" else calls[:-1]:
            assert name in names
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_an_answer_with_a_call_is_as_the_openapi_says(client):
    """A client made from the document that refuses a message without content, or a reason that it does not know."""
    root = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    answers = root.get("/openapi.json", cast_to=object)["paths"]["/v1/chat/completions"]["post"]["responses"]
    body = {**ASKED, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    made = client.post("/chat/completions", body=body, cast_to=object)
    assert made["choices"][0]["finish_reason"] == "tool_calls"
    jsonschema.validate(made, answers["200"]["content"]["application/json"]["schema"])


def test_functions_and_their_results_are_in_the_prompt(server, client):
    """Functions that the model does not hear of, or hears of where none may be called; arguments as a text in the
    template.
    """
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "8"},
    ]
    talk = "<|user|>Add.<|assistant|>[add 7]<|tool|>8<|assistant|>"
    for choice, head in (("none", ""), ("auto", "<add><find><now>"), (None, "<add><find><now>")):
        extra = {"policy": "full", "tool_choice": choice}
        answer = client.chat.completions.create(
            model="tiny-python-llama", messages=messages, tools=TOOLS, max_tokens=8, seed=1, extra_body=extra
        )
        completions: list[Completion] = []
        params = SamplingParams(max_tokens=8, seed=1, temperature=1.0)
        for _ in server.reference.stream([head + talk], completions, params, policy="full", adds_special_tokens=False):
            pass
        assert answer.choices[0].message.content == completions[0].text
        assert answer.choices[0].message.tool_calls is None


def test_an_answer_is_a_call_or_has_its_form(client):
    """A form that a call has to have, too, or an answer that is neither."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": FIND}}
    for seed in range(6):
        asked = {**ASKED, "tools": TOOLS, "response_format": form, "temperature": 1.5, "max_tokens": 300, "seed": seed}
        (choice,) = client.chat.completions.create(**asked).choices
        if choice.message.tool_calls:
            call = choice.message.tool_calls[0].function
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        else:
            jsonschema.validate(json.loads(choice.message.content), FIND)


def test_marks_that_are_special_tokens_are_read():
    """A model whose marks of calls are tokens that texts leave out: its calls would be text."""
    texts = ["Well", "", '\n{"name": "add", "argu', 'ments": {"x": 1}}\n', "", ""]
    ids = [1, 7, 2, 3, 8, 9]
    special = {7: "<tool_call>", 8: "</tool_call>", 9: "<|end|>"}
    tokens = [
        StreamedToken(0, text, 12, 1.0, place == 5, 0, token)
        for place, (text, token) in enumerate(zip(texts, ids, strict=True))
    ]
    body = ChatCompletionBody.model_validate({"messages": [], "tools": TOOLS})
    use = tool_use(TOOLS, None, None, "hermes")
    jobs = [Job("", SamplingParams(), FULL)]
    done = Completion(prompt="", text="".join(texts), finish_reason="stop")
    answer = ChatAnswer(body, jobs, "m", None, use, special)  # type: ignore[arg-type]
    for token in tokens:
        answer.take(0, token)
    (choice,) = answer.whole([done])["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Well"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"x": 1}'}
    answer = ChatAnswer(body, jobs, "m", None, use, special)  # type: ignore[arg-type]
    deltas = [chunk["choices"][0]["delta"] for token in tokens if (chunk := answer.chunk(0, token)) is not None]
    assert "".join(delta.get("content", "") for delta in deltas) == "Well"
    assert answer.last_chunk(0, done)["choices"][0]["finish_reason"] == "tool_calls"


NAMED = {"type": "function", "function": {"name": "sub"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tools": ({"tool_choice": "required"}, "tool_choice needs tools"),
    "another function": ({"tools": TOOLS, "tool_choice": NAMED}, "name one of add, find, now"),
    "a word": ({"tools": TOOLS, "tool_choice": "always"}, "must be none, auto, required"),
    "no function": ({"tools": [{"type": "function"}]}, 'a tool must be {"type": "function"'),
    "a name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "with a name of up to 64"),
    "twice": ({"tools": [TOOLS[0], TOOLS[0]]}, "got add twice"),
    "parameters": (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]},
        "parameters of a tool must be a JSON schema",
    ),
    "parameters of no use": (
        {
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}],
            "tool_choice": "required",
        },
        "parameters of tools can not be used: Invalid type: x; mend",
    ),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
        "arguments of a call must be JSON",
    ),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "must be a list"),
    "format": ({"response_format": {"type": "yaml"}}, "response_format must have a type of"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "give a schema"),
    "keyword": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"unevaluatedItems": False}}}},
        "the schema of response_format can not be used: Unimplemented",
    ),
    "two forms": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "response_format and structured_outputs",
    ),
    "regex": ({"structured_outputs": {"regex": "("}}, "regex of structured_outputs can not be used"),
    "unknown": ({"structured_outputs": {"yaml": "("}}, "structured_outputs has one of"),
    "older": ({"guided_regex": "a"}, 'give structured_outputs {"regex": …}'),
    "form and call": (
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        "where a call may be it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_rule_and_the_value(client, case):
    """A mistake that is answered by 500, or by an answer of another form."""
    changes, words = REFUSED[case]
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body={**ASKED, "max_tokens": 2, **changes}, cast_to=object)
    assert caught.value.status_code == 400 and words in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]


def test_calls_need_a_parser_unless_they_are_required():
    """Calls that come as text, without a word of why."""
    with pytest.raises(InputError, match="--tool-call-parser"):
        tool_use(TOOLS, None, None, None)
    use = tool_use(TOOLS, "required", None, None)
    assert use is not None and use.form.name == "hermes"
    assert tool_use(TOOLS, "none", None, None) is None and tool_use([], None, None, None) is None
