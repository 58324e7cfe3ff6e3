"""Chat messages: which tokens are the assistant's words, found in what a chat template makes of a conversation."""
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import write_byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ee_tuning.config import DataSection
from ee_tuning.data.chat import ChatFormat
from ee_tuning.data.documents import Conversation
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokens import PackedSamples
from ee_tuning.errors import InputError

MARKS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "</s>", "[INST]", "[/INST]"]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
          "{{ '\n' }}{% endfor %}")
TRIMMED = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
INSTRUCT = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}")
PLAIN = "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}" \
        "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
# Earlier turns lose what the last one gets.
THINKING = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
            "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
            "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MESSAGES = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi — you."},
            {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi.\nBye."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """One token a byte, and some marks."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), *MARKS)


def said(tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list[dict[str, Any]]) -> list[str]:
    """The text of each run of marked tokens."""
    ids, marks = ChatFormat(tokenizer, template).encode(Conversation(messages, None, lambda: "chats.jsonl:7"))
    assert len(ids) == len(marks)
    runs = np.split(np.array(ids), np.flatnonzero(np.diff(np.array(marks, int))) + 1)
    return [tokenizer.decode(run) for index, run in enumerate(runs) if (index % 2 == 0) == marks[0]]


@pytest.mark.parametrize(("template", "wanted"), [
    (CHATML, ["Hi — you.<|im_end|>", "Hi.\nBye.<|im_end|>"]),
    (MARKED, ["Hi — you.<|im_end|>", "Hi.\nBye.<|im_end|>"]),
    (TRIMMED, ["Hi — you.<|eot|>", "Hi.\nBye.<|eot|>"]),
    (INSTRUCT, [" Hi — you. </s>", " Hi.\nBye. </s>"]),
    (PLAIN, ["Hi — you.\n", "Hi.\nBye.\n"]),
    (THINKING, ["Hi — you.<|im_end|>", "<think></think>Hi.\nBye.<|im_end|>"]),
], ids=["chatml", "marked", "trimmed", "instruct", "plain", "thinking"])
def test_the_assistants_words_are_found(tokenizer: PreTrainedTokenizerFast, template: str, wanted: list[str]) -> None:
    """A prompt that is learned, an answer that is not, or one whose end-of-turn token is not: such heads never stop talking."""
    messages = MESSAGES if template is not INSTRUCT else MESSAGES[1:]
    assert said(tokenizer, template, messages) == wanted


def test_a_template_with_marks_says_what_one_without_them_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers' own reading of {% generation %} against ours of the same template without it."""
    for number in range(1, 5):
        messages = [{"role": ("user", "assistant")[turn % 2], "content": "word " * (turn * 3 + number)} for turn in range(2 * number)]
        conversation = Conversation(messages, None, lambda: "")
        assert ChatFormat(tokenizer, CHATML).encode(conversation) == ChatFormat(tokenizer, MARKED).encode(conversation)


@pytest.mark.parametrize(("template", "messages", "words"), [
    (None, MESSAGES, ["chats.jsonl:7", "no chat template", "data.chat_template"]),
    ("{{ raise_exception('roles must alternate') }}", MESSAGES, ["chats.jsonl:7", "roles must alternate"]),
    ("{{ '\\ud800' }}" + CHATML, MESSAGES, ["chats.jsonl:7", "half of a surrogate pair"]),
    ("{{ messages | length }}" + CHATML, MESSAGES, ["chats.jsonl:7", "generation"]),
    (THINKING.replace("m['content']", "m['content'].split('—')[-1]"), MESSAGES, ["chats.jsonl:7", "generation"]),
])
def test_what_can_not_be_found_is_refused(tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list,
                                          words: list[str]) -> None:
    """Marks put somewhere in a text that is another one than the template made."""
    with pytest.raises(InputError) as error:
        said(tokenizer, template, messages)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_chats_and_texts_share_a_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A mask shifted by one, or lost between tokenizer and micro-batch; texts beside chats that are masked along."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "template.jinja").write_text(CHATML)
    lines = [{"text": "plain"}, {"messages": MESSAGES}, {"text": "more"}, {"text": "tail", "messages": None}]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSection(paths=(str(tmp_path / "mix.jsonl"),), chat_template=str(tmp_path / "template.jinja"), valid_fraction=0.0)
    samples = load_samples(data, tmp_path / "model", seq_length=8, vocab_size=300, max_positions=64, needs_validation=False).train
    assert isinstance(samples, PackedSamples) and samples.counts is not None
    learned = [tokenizer.decode(run) for run in np.split(samples.stream, np.flatnonzero(np.diff(samples.counts.astype(int))) + 1)][::2]
    assert learned == ["plain<|endoftext|>", "Hi — you.<|im_end|>", "Hi.\nBye.<|im_end|>", "more<|endoftext|>tail<|endoftext|>"]
    for index in range(len(samples)):
        row = samples.sample(index)
        assert row.loss_mask.tolist() == samples.counts[8 * index + 1: 8 * index + 9].tolist()
        assert row.tokens.tolist() == samples.stream[8 * index: 8 * index + 9].tolist()


def test_an_answer_without_an_end_of_its_own_is_ended_by_end_of_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A head that never learns to stop; and one that learns to stop twice."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    ends = {}
    for name, template in (("plain", PLAIN), ("chatml", CHATML), ("own", CHATML.replace("<|im_end|>\\n", "<|endoftext|>").replace(
            "<|im_end|>\n", "<|endoftext|>"))):
        (tmp_path / name).write_text(template)
        data = DataSection(paths=(str(tmp_path / "chat.jsonl"),), chat_template=str(tmp_path / name))
        samples = load_samples(data, tmp_path / "model", seq_length=8, vocab_size=300, max_positions=64, needs_validation=False).train
        assert isinstance(samples, PackedSamples) and samples.counts is not None
        ends[name] = (tokenizer.decode(samples.stream[-2:]), samples.counts[-2:].tolist())
    assert ends == {"plain": ("\n<|endoftext|>", [1, 1]), "chatml": ("\n<|endoftext|>", [0, 0]), "own": (".<|endoftext|>", [1, 1])}


@pytest.mark.parametrize(("line", "words"), [
    ({"messages": []}, "mix.jsonl:2: 'messages' must be a list of messages, got []"),
    ({"messages": ["hello"]}, "must be an object with role and content, got 'hello'"),
    ({"messages": [{"content": "hello"}]}, "must be an object with role and content"),
    ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
])
def test_messages_that_make_no_sense_are_refused_by_their_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: dict,
                                                               words: str) -> None:
    """A KeyError out of a template, without the line to mend."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text('{"text": "first"}\n' + json.dumps(line))
    with pytest.raises(InputError) as error:
        load_samples(DataSection(paths=(str(tmp_path / "mix.jsonl"),)), tmp_path / "model", seq_length=8, vocab_size=300, max_positions=64)
    assert words in str(error.value) and "mix.jsonl:2" in str(error.value)


@pytest.mark.parametrize("message", [{"role": "\ud800", "content": "x"}, {"role": "user", "content": ["\ud800"]},
                                     {"role": "user", "content": "x", "name": "\ud800"}])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, message: dict) -> None:
    """A traceback out of the tokenizer for a role or a name, without the line to mend."""
    tokenizer.save_pretrained(tmp_path / "model")
    for template in (CHATML, MARKED):
        (tmp_path / "template").write_text("{{ messages[0]['name'] }}" + template.replace("m['content']", "m['content'] | string"))
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [message, {"role": "assistant", "content": "y"}]}))
        with pytest.raises(InputError, match=r"chat\.jsonl:1: 'messages' holds half of a surrogate pair") as error:
            load_samples(DataSection(paths=(str(tmp_path / "chat.jsonl"),), chat_template=str(tmp_path / "template")), tmp_path / "model",
                         seq_length=8, vocab_size=300, max_positions=64)
        assert "\n" not in str(error.value)


def test_messages_with_times_are_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A traceback out of a hash for a column that is no JSON."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "template").write_text(CHATML)
    said_at = [{**message, "at": datetime.datetime(2024, 1, 2), "raw": b"\xff"} for message in MESSAGES]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said_at}]), tmp_path / "chat.parquet")
    data = DataSection(paths=(str(tmp_path / "chat.parquet"),), chat_template=str(tmp_path / "template"))
    samples = load_samples(data, tmp_path / "model", seq_length=8, vocab_size=300, max_positions=64, needs_validation=False).train
    assert isinstance(samples, PackedSamples) and "Hi — you." in tokenizer.decode(samples.stream)


def test_chats_without_an_assistant_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A run of a night that learns from no token."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "template").write_text(CHATML)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 50}]}))
    with pytest.raises(InputError, match="has no token to learn from"):
        load_samples(DataSection(paths=(str(tmp_path / "chat.jsonl"),), chat_template=str(tmp_path / "template")), tmp_path / "model",
                     seq_length=8, vocab_size=300, max_positions=64, needs_validation=False)
