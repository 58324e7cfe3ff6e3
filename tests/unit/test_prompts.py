"""Prompts from a file, and talk at a terminal: each prompt by its own wishes, and a bad line alone is refused."""
import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM, SamplingParams, cli
from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.evaluation.demo import CHECKOUT
from ee_tuning.generation import chat as chat_module
from ee_tuning.generation.prompts import read_prompts

MODEL = CHECKOUT / "examples" / "tiny-python-llama"


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exits(MODEL, tmp_path_factory.mktemp("exits") / "heads", exit_layers=[4, 8], init="copy")


@pytest.fixture(scope="module")
def llm(exits: Path) -> EarlyExitLLM:
    return EarlyExitLLM.load(MODEL, exits)


LINES = [{"prompt": "def main(", "max_new_tokens": 5}, {"prompt": "import ", "policy": "fixed", "exit_layer": 4, "logprobs": 2},
         {"prompt": "x = ", "temperature": -1}, {"prompt": "class A", "policy": "speculative", "n": 2, "temperature": 0.9},
         {"prompt": "y", "treshold": 0.5}, {"prompt": "z", "logit_bias": {"65": 100}, "max_new_tokens": 3},
         {"prompt": "a", "max_pending": 2}]


def test_each_line_by_its_own_wishes(exits, tmp_path, capsys):
    """Wishes of one line that reach another; a bad one that takes the others down; a record that is lost."""
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    code = cli.main(["generate", "--model", str(MODEL), "--exits", str(exits), "--prompts", str(tmp_path / "prompts.jsonl"), "--output",
                     str(tmp_path / "out.jsonl"), "--max-new-tokens", "8", "--ignore-eos"])
    assert code == 2, "some lines were refused"
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    errors = {record["prompt"]: record["error"] for record in records if "error" in record}
    assert set(errors) == {"x = ", "y", "a"}
    assert "temperature" in errors["x = "] and "did you mean generation.threshold" in errors["y"] and "--set" in errors["a"]
    made = [record for record in records if "error" not in record]
    assert [(r["prompt"], r["index"], len(r["token_ids"])) for r in made] == [
        ("def main(", 0, 5), ("import ", 0, 8), ("class A", 0, 8), ("class A", 1, 8), ("z", 0, 3)]
    assert made[1]["exit_layers"] == [4] * 8 and all(len(top) == 2 for top in made[1]["top_logprobs"])
    assert made[1]["statistics"]["exit_histogram"] == {"4": 8}
    assert made[4]["text"] == "AAA" and made[2]["text"] != made[3]["text"]
    assert "mean depth" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [
    ("", "is empty"), ("not json", "line 1 of .* must be a JSON object"), ('{"prompt": 3}', 'a text "prompt"'), ("[1]", 'a text "prompt"')])
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, words):
    """A traceback, or prompts that are silently none."""
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / "prompts.jsonl")


def test_generate_takes_params_for_all_or_for_each(llm):
    """Params that are dropped, or all prompts given the first one's."""
    one, other = SamplingParams(max_tokens=3, ignore_eos=True), SamplingParams(max_tokens=6, ignore_eos=True, n=2, temperature=1.0)
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], one, policy="full")] == [3, 3]
    each = llm.generate(["a", "b"], [one, other])
    assert [(c.prompt, c.index, len(c.token_ids)) for c in each] == [("a", 0, 3), ("b", 0, 6), ("b", 1, 6)]
    with pytest.raises(InputError, match="one for each of the 2, got 1"):
        llm.generate(["a", "b"], [one])
    stopped, = llm.generate(["import os\nimport "], SamplingParams(max_tokens=40, stop=("\n",)))
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
        c.token_ids for c in llm.generate(prompts, policy="full", **options)]


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
    once, twice, never, late = llm.generate(["a"] * 4, [
        SamplingParams(stop=("<|eot|>",), **wants), SamplingParams(stop=("<|eot|><|eot|>",), **wants),
        SamplingParams(stop=("<|end|>",), **wants), SamplingParams(stop=("<|eot|>",), min_tokens=3, **wants)], policy="full")
    assert (once.token_ids, once.finish_reason, once.text) == ([257], "stop", "")
    assert (twice.token_ids, twice.finish_reason) == ([257, 257], "stop")
    assert (never.token_ids, never.finish_reason) == ([257] * 6, "length")
    assert late.token_ids[3:] == [257] and 257 not in late.token_ids[:3], "as with a stop id, which is not to be had before"
