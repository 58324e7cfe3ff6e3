"""Prompts from a file, and talk at a terminal: each prompt by its own wishes, and a bad line alone is refused."""

import contextlib
import dataclasses
import gzip
import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM, SamplingParams, cli
from ee_tuning.config import Config, load_config
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.errors import InputError
from ee_tuning.generation import chat as chat_module
from ee_tuning.generation.completion import StreamedToken
from ee_tuning.generation.prompts import read_prompts, requests_of
from ee_tuning.parallel.topology import Topology

pytestmark = pytest.mark.slow

MODEL = CHECKOUT / "examples" / "tiny-python-llama"


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exits(MODEL, tmp_path_factory.mktemp("exits") / "heads", exit_layers=[4, 8], init="copy")


@pytest.fixture(scope="module")
def llm(exits: Path) -> EarlyExitLLM:
    return EarlyExitLLM.load(MODEL, exits)


LINES = [
    {"prompt": "def main(", "max_new_tokens": 5},
    {"prompt": "import ", "policy": "fixed", "exit_layer": 4, "logprobs": 2},
    {"prompt": "x = ", "temperature": -1},
    {"prompt": "class A", "policy": "speculative", "n": 2, "temperature": 0.9},
    {"prompt": "y", "treshold": 0.5},
    {"prompt": "z", "logit_bias": {"65": 100}, "max_new_tokens": 3},
    {"prompt": "a", "max_pending": 2},
]


def test_each_line_by_its_own_wishes(exits, tmp_path, capsys):
    """Wishes of one line that reach another; a bad one that takes the others down; a record that is lost."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    code = cli.main(
        (
            f"generate --model {MODEL} --exits {exits} --prompts {tmp_path / 'prompts.jsonl'} --output "
            f"{tmp_path / 'out.jsonl'} --max-new-tokens 8 --ignore-eos"
        ).split()
    )
    assert code == 2, "some lines were refused"
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    errors = {record["prompt"]: record["error"] for record in records if "error" in record}
    assert set(errors) == {"x = ", "y", "a"}
    assert (
        "temperature" in errors["x = "]
        and "did you mean generation.threshold" in errors["y"]
        and "--set" in errors["a"]
    )
    made = [record for record in records if "error" not in record]
    assert [(r["prompt"], r["index"], len(r["token_ids"])) for r in made] == [
        ("def main(", 0, 5),
        ("import ", 0, 8),
        ("class A", 0, 8),
        ("class A", 1, 8),
        ("z", 0, 3),
    ]
    assert made[1]["exit_layers"] == [4] * 8 and all(len(top) == 2 for top in made[1]["top_logprobs"])
    assert made[1]["statistics"]["exit_histogram"] == {"4": 8}
    assert made[4]["text"] == "AAA" and made[2]["text"] != made[3]["text"]
    told = capsys.readouterr().err
    assert "mean depth" in told and f"3 of 7 prompts could not be done; {tmp_path / 'out.jsonl'} tells why" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("not json", ":1: a line must be a JSON object"),
        ('{"prompt": 3}', 'a text "prompt"'),
        ("[1]", "must be a JSON object"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, words):
    """A traceback, or prompts that are silently none."""
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    "content", [gzip.compress(b'{"prompt": "a"}\n', mtime=0), '{"prompt": "a"}\n'.encode("utf-16")]
)
def test_a_file_that_is_packed_or_encoded_otherwise_is_told(tmp_path, content):
    """A byte that can not be decoded, and nothing about what to do."""
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"in UTF-8, got .*unpack it where it is packed, else convert it"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_completions_that_no_line_can_have_are_not_expected(llm: EarlyExitLLM) -> None:
    """A progress line of a billion completions and a thousand years, for a line that is refused in the end."""
    _, (bad, good) = requests_of(llm, [], [{"prompt": "a", "n": 10**9}, {"prompt": "b", "n": 2}])
    assert bad.error == "n must be in 1..1024, got 1000000000"
    assert (bad.num_completions, good.num_completions) == (1, 2)


def test_generate_takes_params_for_all_or_for_each(llm):
    """Params that are dropped, or all prompts given the first one's."""
    one, other = (
        SamplingParams(max_tokens=3, ignore_eos=True),
        SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=1.0),
    )
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], one, policy="full")] == [3, 3]
    each = llm.generate(["a", "b"], [one, other])
    assert [(c.prompt, c.index, len(c.token_ids)) for c in each] == [("a", 0, 3), ("b", 0, 6), ("b", 1, 6)]
    with pytest.raises(InputError, match="one for each of the 2, got 1"):
        llm.generate(["a", "b"], [one])
    (stopped,) = llm.generate(["import os\nimport "], SamplingParams(max_tokens=40, stop=("\n",)))
    assert stopped.finish_reason == "stop" and "\n" not in stopped.text
    assert llm.engine is not None and llm.engine.is_idle


def test_a_conversation_is_not_read_from_its_beginning_at_every_turn(llm):
    """A new engine, which knows nothing, whenever the conversation has grown; or keys and values that are another's."""
    said, reused = "def parse(text, start):\n" * 12, []
    for _ in range(4):
        options = {"policy": "full", "max_new_tokens": 24, "ignore_eos": True}
        wanted = llm.generate([said], **options, reuse_prefixes=False)[0] if len(reused) == 3 else None
        made = llm.generate([said], **options)[0]
        reused.append(made.statistics.num_reused / len(said))
        said += made.text + "\n\ndef "
        assert wanted is None or made.token_ids == wanted.token_ids
    assert reused[0] == 0 and reused[2] > 0.8, "the next turn finds room, and what was read"


def test_speculation_says_what_full_depth_says(llm):
    """Text that hangs on which exit drafts, on the shipped model in float32."""
    prompts = ["def read_settings(path):\n", "class Reader:\n    def __init__(self, "]
    options = {"max_new_tokens": 60, "ignore_eos": True}
    assert [c.token_ids for c in llm.generate(prompts, policy="speculative", **options)] == [
        c.token_ids for c in llm.generate(prompts, policy="full", **options)
    ]


def test_chat_keeps_what_was_said_and_refuses_without_a_template(exits, monkeypatch, capsys):
    """An answer that knows nothing of the turn before; a base model that is talked to in no format at all."""
    config = load_config(None, {"model.path": str(MODEL), "exits.path": str(exits), "generation.max_new_tokens": 4})
    with pytest.raises(InputError, match="chat template"):
        chat_module.chat(config, ask=iter([""]).__next__)
    asked, from_config = [], EarlyExitLLM.from_config

    def load(config, topology):
        made = from_config(config, topology)
        made.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        stream = made.stream
        made.stream = lambda prompts, *args, **kwargs: (asked.append(prompts[0]), stream(prompts, *args, **kwargs))[1]
        return made

    monkeypatch.setattr(chat_module.EarlyExitLLM, "from_config", load)
    chat_module.chat(config, system="be brief", ask=iter(["one", "two", "x" * 2000, "/reset", "three", ""]).__next__)
    assert asked[0] == "system: be brief\nuser: one\n"
    assert asked[1].startswith("system: be brief\nuser: one\nassistant: ") and asked[1].endswith("user: two\n")
    assert asked[3] == "system: be brief\nuser: three\n"
    assert "shorter than the model's context" in " ".join(capsys.readouterr().out.split())


def test_a_stop_string_that_is_a_special_token_stops(tmp_path: Path) -> None:
    """`--stop '<|eot|>'` that is taken without a word, and never stops; or that stops before min_tokens are there."""
    random_llama(tmp_path, vocab_size=260, eos_token_id=256)
    write_byte_tokenizer(tmp_path, "<|eot|>", "<|end|>")
    llm = EarlyExitLLM.load(tmp_path)
    wants: dict[str, Any] = {"max_tokens": 6, "logit_bias": {257: 100}}
    once, twice, never, late = llm.generate(
        ["a"] * 4,
        [
            SamplingParams(stop=("<|eot|>",), **wants),
            SamplingParams(stop=("<|eot|><|eot|>",), **wants),
            SamplingParams(stop=("<|end|>",), **wants),
            SamplingParams(stop=("<|eot|>",), min_tokens=3, **wants),
        ],
        policy="full",
    )
    assert (once.token_ids, once.finish_reason, once.text) == ([257], "stop", "")
    assert (twice.token_ids, twice.finish_reason) == ([257, 257], "stop")
    assert (never.token_ids, never.finish_reason) == ([257] * 6, "length")
    assert late.token_ids[3:] == [257] and 257 not in late.token_ids[:3], (
        "as with a stop id, which is not to be had before"
    )


def test_what_is_said_in_another_encoding_is_refused(exits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback out of a pipe that is not UTF-8."""
    monkeypatch.setattr(chat_module.ChatTemplate, "source", lambda self, has_tools=False: "{{ messages[-1].content }}")
    config = load_config(None, {"model.path": str(MODEL), "generation.policy": "full"})
    with pytest.raises(InputError, match=r"must be UTF-8 text, .*0xff"):
        chat_module.chat(config, ask=lambda: b"a\xff".decode())


def test_ctrl_c_ends_an_answer_and_then_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that goes wrong takes the conversation with it; or is forgotten, so that the next turn knows nothing of
    it.
    """
    config = load_config(
        None,
        {
            "model.path": str(MODEL),
            "generation.policy": "full",
            "generation.ignore_eos": True,
            "generation.max_new_tokens": 50,
        },
    )
    asked, from_config, presses = list[str](), EarlyExitLLM.from_config, {0: [3], 1: [49]}

    def load(config: Config, topology: Topology) -> EarlyExitLLM:
        made = from_config(config, topology)
        made.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        stream = made.stream

        def pressed(prompts: list[str], *args: Any, **keys: Any) -> Iterator[StreamedToken]:
            asked.append(prompts[0])
            for number, token in enumerate(stream(prompts, *args, **keys)):
                for _ in range(presses.get(len(asked) - 1, []).count(number)):
                    signal.raise_signal(signal.SIGINT)
                yield dataclasses.replace(token, text=f"<{number}>")

        made.stream = pressed  # type: ignore[method-assign, assignment]
        return made

    monkeypatch.setattr(chat_module.EarlyExitLLM, "from_config", load)
    before = signal.getsignal(signal.SIGINT)
    chat_module.chat(config, ask=iter(["one", "two", "three", ""]).__next__)
    assert asked[1] == "user: one\nassistant: <0><1><2><3>\nuser: two\n", "what was said so far stays"
    assert asked[2].endswith("<49>\nuser: three\n") and signal.getsignal(signal.SIGINT) is before
    asked.clear()
    presses.clear()
    presses[0] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        chat_module.chat(config, ask=iter(["one", "two", ""]).__next__)
    assert len(asked) == 1 and signal.getsignal(signal.SIGINT) is before
    assert "user" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "flags", "words"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            ["--system", "x"],
            "System role not supported; .* leave --system out",
        ),
        ("{% for m in messages %}", [], r"no Jinja: .*endfor.* \(line 1\).*--chat-template"),
        ("{{ nothing.there }}", [], "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", [], "fails on the messages: TypeError"),
        ({"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}, [], r"several chat templates \(rag, tool_use\).*--chat-template"),
        ({"rag": "{{ 1 }}"}, ["--chat-template", "nosuch"], "name a template .*rag.* got 'nosuch'"),
        ({"rag": "{{ 1 }}"}, ["--chat-template", "no/such.jinja"], r"no/such\.jinja can not be read"),
    ],
)
def test_a_template_that_no_conversation_can_begin_with_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | dict[str, str], flags: list[str], words: str
) -> None:
    """A traceback behind the first question, whose words are lost."""
    random_llama(tmp_path, vocab_size=257, eos_token_id=256)
    write_byte_tokenizer(tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert cli.main(["chat", "--model", str(tmp_path), "--policy", "full", *flags]) == 2
    told = capsys.readouterr().err
    assert re.search(words, told) and told.strip().count("\n") == 0, told


def test_a_prompt_is_begun_once_and_not_ended(tmp_path: Path) -> None:
    """A beginning of text that is doubled where the prompt spells it out; an end of text between the prompt and its
    completion.
    """
    random_llama(tmp_path, vocab_size=VOCABULARY + 1, bos_token_id=VOCABULARY)
    write_byte_tokenizer(tmp_path, "<s>", encloses=True)
    llm = EarlyExitLLM.load(tmp_path)
    begin, (h, i) = VOCABULARY, llm.tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert llm.encode("hi") == llm.encode("<s>hi") == [begin, h, i] and llm.encode("") == [begin]
    assert llm.encode("<s><s>hi") == [begin, begin, h, i] and llm.encode("hi", adds_special_tokens=False) == [h, i]


def test_one_prompt_is_no_list_of_letters(llm):
    """A text in place of a list: each of its letters is completed by itself."""
    params = SamplingParams(max_tokens=4)
    (alone,), others = (
        llm.generate("def main(", params),
        llm.generate((prompt for prompt in ("def main(", "import ")), params),
    )
    assert alone.prompt == "def main(" and [alone.token_ids, "import "] == [others[0].token_ids, others[1].prompt]
    assert len(list(llm.stream("def main(", None, params))) == 4


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Activations that overflow: the vocabulary's first token again and again (`!!!!`), and exit code 0."""
    model = random_llama(tmp_path / "model", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = math.inf  # of the byte "!"
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    llm = EarlyExitLLM.load(tmp_path / "model")
    for params in (
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=3, temperature=1.0),
        SamplingParams(max_tokens=3, logprobs=1),
    ):
        with pytest.raises(InputError, match=r"behind layer 6 are no numbers \(NaN.*overflow in float32"):
            llm.generate("a!", params, policy="full")
    assert llm.generate("ab", SamplingParams(max_tokens=3), policy="full")[0].finish_reason == "length", (
        "the engine is as it was"
    )
    (tmp_path / "prompts").write_text('{"prompt": "a!", "n": 2, "temperature": 1}\n{"prompt": "ab"}\n')
    assert (
        cli.main(
            (
                f"generate --model {tmp_path / 'model'} --policy full --max-new-tokens 3 --prompts "
                f"{tmp_path / 'prompts'}"
            ).split()
        )
        == 2
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["a!", "ab"]
    assert "no numbers" in records[0]["error"] and len(records[1]["token_ids"]) == 3


@pytest.mark.parametrize(
    ("changes", "stops"), [({}, (257,)), ({"stop_token_ids": [5]}, (5, 257)), ({"ignore_eos": True}, ())]
)
def test_an_answer_ends_where_the_template_ends_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], stops: tuple[int, ...]
) -> None:
    """The config names the end of text of the base model alone, and the chat model never says that."""
    random_llama(tmp_path, vocab_size=260, eos_token_id=256)
    write_byte_tokenizer(tmp_path, "<|eot|>").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}")
    asked: list[Any] = []

    def stream(self: EarlyExitLLM, *args: Any, **keys: Any) -> Iterator[StreamedToken]:
        asked.append(keys["stop_token_ids"])
        return iter(())

    monkeypatch.setattr(EarlyExitLLM, "stream", stream)
    monkeypatch.setattr(chat_module, "closing", contextlib.nullcontext)
    config = load_config(
        None,
        {
            "model.path": str(tmp_path),
            "generation.policy": "full",
            **{f"generation.{key}": value for key, value in changes.items()},
        },
    )
    chat_module.chat(config, ask=iter(["hi", ""]).__next__)
    assert asked == [stops]
