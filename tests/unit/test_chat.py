"""Chat messages: which tokens are the assistant's words, found in what a chat template makes of a conversation."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import write_byte_tokenizer
from refusals import refusal
from transformers import PreTrainedTokenizerFast

from ee_tuning.config import DataSection
from ee_tuning.data.chat import ChatFormat
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.data.records import Conversation
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_digests
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.errors import InputError

MARKS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "</s>", "[INST]", "[/INST]"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
TRIMMED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
# Earlier turns lose what the last one gets.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of Qwen3's kind: what was thought before the last question is left out. Of R1's: always, and the generation prompt
# begins a thought.
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}{%- for m in messages %}{%- set content = m.content or '' %}{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
R1 = """{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>' + m.content.split('</think>')[-1].strip() + '<|eot|>' }}
{%- else %}{{- '[INST]' + m.content }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|><think>\n' }}{%- endif %}"""
THOUGHTS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": "<think>\n4+1.\n</think>\n\n5"},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi — you."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hi.\nBye."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """One token a byte, and some marks."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), *MARKS)


def texts_of(
    tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list[dict[str, Any]]
) -> list[list[tuple[str, bool]]]:
    """Per text that is learned from, its runs of tokens, and whether they are marked."""
    texts = []
    for ids, marks in ChatFormat(tokenizer, template).encode(Conversation(messages, None, lambda: "chats.jsonl:7")):
        assert len(ids) == len(marks)
        runs = np.split(np.array(ids), np.flatnonzero(np.diff(np.array(marks, int))) + 1)
        texts.append([(tokenizer.decode(run), (index % 2 == 0) == marks[0]) for index, run in enumerate(runs)])
    return texts


def splits_of(
    folder: Path, file: str, template: str | None = None, needs_validation: bool = False, **data: Any
) -> Splits:
    """Samples of a file in `folder`, by the tokenizer in its `model`."""
    if template is not None:
        (folder / "template").write_text(template)
        data["chat_template"] = str(folder / "template")
    section = DataSection(paths=(str(folder / file),), **data)
    return load_samples(
        section,
        folder / "model",
        seq_length=8,
        vocab_size=300,
        max_positions=64,
        needs_validation=needs_validation,
    )


def said(tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list[dict[str, Any]]) -> list[str]:
    """The text of each run of marked tokens, where there is one text."""
    (runs,) = texts_of(tokenizer, template, messages)
    return [text for text, is_marked in runs if is_marked]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, ["Hi — you.<|im_end|>", "Hi.\nBye.<|im_end|>"]),
        (MARKED, ["Hi — you.<|im_end|>", "Hi.\nBye.<|im_end|>"]),
        (TRIMMED, ["Hi — you.<|eot|>", "Hi.\nBye.<|eot|>"]),
        (INSTRUCT, [" Hi — you. </s>", " Hi.\nBye. </s>"]),
        (PLAIN, ["Hi — you.\n", "Hi.\nBye.\n"]),
        (THINKING, ["Hi — you.<|im_end|>", "<think></think>Hi.\nBye.<|im_end|>"]),
        (R1, ["Hi — you.<|eot|>", "Hi.\nBye.<|eot|>"]),
    ],
    ids=["chatml", "marked", "trimmed", "instruct", "plain", "thinking", "r1"],
)
def test_the_assistants_words_are_found(tokenizer: PreTrainedTokenizerFast, template: str, wanted: list[str]) -> None:
    """A prompt that is learned, an answer that is not, or one whose end-of-turn token is not: such heads never stop
    talking.
    """
    messages = MESSAGES if template is not INSTRUCT else MESSAGES[1:]
    assert said(tokenizer, template, messages) == wanted


def test_a_template_with_marks_says_what_one_without_them_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers' own reading of {% generation %} against ours of the same template without it."""
    for number in range(1, 5):
        messages = [
            {"role": ("user", "assistant")[turn % 2], "content": "word " * (turn * 3 + number)}
            for turn in range(2 * number)
        ]
        conversation = Conversation(messages, None, lambda: "")
        assert ChatFormat(tokenizer, CHATML).encode(conversation) == ChatFormat(tokenizer, MARKED).encode(conversation)


@pytest.mark.parametrize(
    "template",
    [CHATML, MARKED, TRIMMED, INSTRUCT, PLAIN, MARKED.replace("'<|im_end|>' }}{% endg", "'<|im_end|>\n' }}{% endg")],
)
def test_the_end_of_what_was_cut_is_not_learned(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Heads that learn to stop in the middle, where a limit cut the answer that they learn from."""
    conversation = Conversation(MESSAGES[1:], None, lambda: "", is_cut=True)
    ((ids, marks),) = ChatFormat(tokenizer, template).encode(conversation)
    ((_, before),) = ChatFormat(tokenizer, template).encode(Conversation(MESSAGES[1:], None, lambda: ""))
    first = max(place for place in range(len(before)) if not before[place] and any(before[place:]))
    assert marks[:first] == before[:first] and any(marks[:first])
    learned = [token for token, is_marked in zip(ids[first:], marks[first:], strict=True) if is_marked]
    assert tokenizer.decode(learned).strip() == "Hi.\nBye."


def in_keys(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was thought under a key of its own."""
    return [
        {**each, "reasoning_content": each["content"][8:-11], "content": each["content"][-1]}
        if each["role"] == "assistant"
        else each
        for each in messages
    ]


@pytest.mark.parametrize("messages", [THOUGHTS, in_keys(THOUGHTS)], ids=["in the content", "under a key"])
@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (
            QWEN3,
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (R1, "[INST]2+2?<|im_start|><think>\n", "[INST]2+2?<|im_start|>4<|eot|>[INST]+1?<|im_start|><think>\n"),
    ],
    ids=["qwen3", "r1"],
)
def test_every_thought_is_learned_behind_what_the_model_saw(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], template: str, first: str, second: str
) -> None:
    """Templates strip earlier thoughts from the history: such chats were refused, or an answer is learned as if nothing
    was thought.
    """
    texts = texts_of(tokenizer, template, messages)
    opened, end = ("", "<|im_end|>") if template is QWEN3 else ("<think>\n", "<|eot|>")
    thoughts = [
        text.removeprefix(opened) + end for text in ("<think>\nEasy.\n</think>\n\n4", "<think>\n4+1.\n</think>\n\n5")
    ]
    assert [runs[:2] for runs in texts] == [
        [(first, False), (thoughts[0], True)],
        [(second, False), (thoughts[1], True)],
    ]
    assert all(not is_marked for runs in texts for _, is_marked in runs[2:])


def test_the_texts_of_a_chat_are_held_out_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A turn judged by a head that was trained on the same chat; a text that is lost between the template and the
    samples.
    """
    tokenizer.save_pretrained(tmp_path / "model")
    chats = [[{**each, "content": f"{each['content']}{number}"} for each in THOUGHTS] for number in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    splits = splits_of(tmp_path, "chats.jsonl", QWEN3, needs_validation=True, valid_fraction=0.3)
    learned = []
    for part in (splits.train, splits.valid):
        assert isinstance(part, PackedSamples) and part.counts is not None
        runs = np.split(part.stream, np.flatnonzero(np.diff(part.counts.astype(int))) + 1)
        learned.append([tokenizer.decode(run) for run in runs[1 - part.counts[0] :: 2]])
    assert all(learned) and sorted(learned[0] + learned[1]) == sorted(
        f"<think>\n{thought}\n</think>\n\n{word}{number}<|im_end|>"
        for number in range(6)
        for thought, word in (("Easy.", 4), ("4+1.", 5))
    )
    assert not {text[-11:] for text in learned[0]} & {text[-11:] for text in learned[1]}


def test_turns_that_a_template_leaves_alone_share_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """As many texts as turns, each with all that was said before: a conversation of n turns that costs n² tokens
    without need.
    """
    calls = [THOUGHTS[0], THOUGHTS[1], {"role": "tool", "content": "four"}, THOUGHTS[3], *MESSAGES[1:]]
    texts = texts_of(tokenizer, QWEN3, calls)
    assert [[text for text, is_marked in runs if is_marked] for runs in texts] == [
        ["<think>\nEasy.\n</think>\n\n4<|im_end|>", "<think>\n4+1.\n</think>\n\n5<|im_end|>"],
        ["Hi — you.<|im_end|>", "<think>\n\n</think>\n\nHi.\nBye.<|im_end|>"],
    ]
    assert len(texts_of(tokenizer, CHATML, THOUGHTS)) == 1


def test_a_turn_that_a_template_cuts_in_the_history_is_learned_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """A cut of another kind than a thought: words marked that are not the turn's."""
    template = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('—')[-1])")
    texts = texts_of(tokenizer, template, MESSAGES)
    assert [[text for text, is_marked in runs if is_marked] for runs in texts] == [
        ["Hi — you.<|im_end|>"],
        ["Hi.\nBye.<|im_end|>"],
    ]


@pytest.mark.parametrize("template", [CHATML, INSTRUCT, PLAIN, QWEN3, R1])
def test_a_conversation_that_the_assistant_begins_is_read(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """transformers renders no conversation without a message, which was taken for what stands before the first."""
    words = [text for runs in texts_of(tokenizer, template, MESSAGES[2:]) for text, is_marked in runs if is_marked]
    assert [word.strip().startswith(("Hi — you.", "<think>\n\n</think>\n\nHi", "Hi.")) for word in words] == [
        True,
        True,
    ], words


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, MESSAGES, ["chats.jsonl:7", "no chat template", "data.chat_template"]),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, ["chats.jsonl:7", "roles must alternate"]),
        (
            "{% for m in messages %}\n{% if %}{% endfor %}",
            MESSAGES,
            ["chats.jsonl:7", "no Jinja", "line 2", "data.chat_template"],
        ),
        ("{{ missing.there }}", MESSAGES, ["chats.jsonl:7", "'missing' is undefined"]),
        ("{{ messages[0].content + 1 }}", MESSAGES, ["chats.jsonl:7", "fails on the messages: TypeError"]),
        ("tool_use", MESSAGES, ["chats.jsonl:7", "which has none by name", "got 'tool_use'"]),
        ("{{ '\\ud800' }}" + CHATML, MESSAGES, ["chats.jsonl:7", "half of a surrogate pair"]),
        ("{{ messages | length }}" + CHATML, MESSAGES, ["chats.jsonl:7", "generation"]),
        (
            "{% for m in messages %}{{ '<' + m.content[1:] }}{% endfor %}{% if add_generation_prompt %}{{ 'x' }}{% endif %}",
            MESSAGES,
            ["chats.jsonl:7", "generation"],
        ),
    ],
)
def test_what_can_not_be_found_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list, words: list[str]
) -> None:
    """Marks put somewhere in a text that is another one than the template made."""
    message = refusal(said, tokenizer, template, messages)
    assert all(word in message for word in words)


def test_a_template_is_chosen_by_its_name(tmp_path: Path) -> None:
    """Several named templates that are refused though one is the default, or the wrong one taken where tools are
    given.
    """
    tokenizer = write_byte_tokenizer(tmp_path, *MARKS)
    named = {"default": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML, "short": PLAIN}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    digests = tokenizer_digests(tmp_path)
    assert {"chat_template.jinja", "additional_chat_templates/short.jinja"} <= digests.keys(), (
        "a changed one makes other tokens"
    )
    for given, tools, wanted in (
        (None, None, CHATML),
        (None, [{"name": "find"}], named["tool_use"]),
        ("short", [], PLAIN),
    ):
        conversation = Conversation(MESSAGES, tools, lambda: "")
        assert ChatFormat(loaded, given).encode(conversation) == ChatFormat(loaded, wanted).encode(conversation)
    loaded.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(
        InputError, match=r"several chat templates \(rag, tool_use\) and none of the name default; .*--chat-template"
    ):
        said(loaded, None, MESSAGES)
    with pytest.raises(InputError, match=r"whose templates are rag, tool_use.* got 'rga'"):
        said(loaded, "rga", MESSAGES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_max_length": {}}, r"model_max_length in .*tokenizer_config\.json must be a number, got \{\}"),
        ({"chat_template": 5}, "has no chat template"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "has no chat template"),
        ({"chat_template": [{"name": "default"}]}, "can not be read: 'template'"),
        ({"chat_template": {}}, "has no chat template"),
    ],
)
def test_a_tokenizers_config_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """A traceback at the first text, or the first chat, for a file that was edited by hand."""
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=words):
        said(load_tokenizer(tmp_path), None, MESSAGES)


def test_a_template_is_read_from_its_file(tmp_path: Path) -> None:
    """A byte order mark that becomes part of every prompt; a file of no template that says the same of all messages."""
    (tmp_path / "marked.jinja").write_text(CHATML, encoding="utf-8-sig")
    assert read_chat_template(str(tmp_path / "marked.jinja")) == CHATML
    (tmp_path / "text").write_text("no template")
    for path, words in (("text", "holds no {{"), ("missing.jinja", "can not be read"), (".", "can not be read")):
        with pytest.raises(InputError, match=words):
            read_chat_template(str(tmp_path / path))
    assert read_chat_template("tool_use") == "tool_use" and read_chat_template(None) is None


def test_chats_and_texts_share_a_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A mask shifted by one, or lost between tokenizer and micro-batch; texts beside chats that are masked along."""
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [{"text": "plain"}, {"messages": MESSAGES}, {"text": "more"}, {"text": "tail", "messages": None}]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = splits_of(tmp_path, "mix.jsonl", CHATML, valid_fraction=0.0).train
    assert isinstance(samples, PackedSamples) and samples.counts is not None
    learned = [
        tokenizer.decode(run)
        for run in np.split(samples.stream, np.flatnonzero(np.diff(samples.counts.astype(int))) + 1)
    ][::2]
    assert learned == [
        "plain<|endoftext|>",
        "Hi — you.<|im_end|>",
        "Hi.\nBye.<|im_end|>",
        "more<|endoftext|>tail<|endoftext|>",
    ]
    assert samples.windows is not None and 0 < len(samples) == len(samples.windows) < samples.num_windows
    for index, window in enumerate(samples.windows):
        row = samples.sample(index)
        assert (
            row.loss_mask.any() and row.loss_mask.tolist() == samples.counts[8 * window + 1 : 8 * window + 9].tolist()
        )
        assert row.tokens.tolist() == samples.stream[8 * window : 8 * window + 9].tolist()


def test_an_answer_without_an_end_of_its_own_is_ended_by_end_of_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A head that never learns to stop; and one that learns to stop twice."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    ends = {}
    for name, template in (
        ("plain", PLAIN),
        ("chatml", CHATML),
        ("own", CHATML.replace("<|im_end|>\\n", "<|endoftext|>").replace("<|im_end|>\n", "<|endoftext|>")),
    ):
        samples = splits_of(tmp_path, "chat.jsonl", template).train
        assert isinstance(samples, PackedSamples) and samples.counts is not None
        ends[name] = (tokenizer.decode(samples.stream[-2:]), samples.counts[-2:].tolist())
    assert ends == {
        "plain": ("\n<|endoftext|>", [1, 1]),
        "chatml": ("\n<|endoftext|>", [0, 0]),
        "own": (".<|endoftext|>", [1, 1]),
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": {"role": "user"}}, "mix.jsonl:2: 'messages' must be a list of messages, got {'role': 'user'}"),
        ({"messages": ["hello"]}, "must be an object with role and content, or from and value, got 'hello'"),
        ({"messages": [{"content": "hello"}]}, "must be an object with role and content"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_messages_that_make_no_sense_are_refused_by_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: dict, words: str
) -> None:
    """A KeyError out of a template, without the line to mend."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mix.jsonl").write_text('{"text": "first"}\n' + json.dumps(line))
    message = refusal(splits_of, tmp_path, "mix.jsonl")
    assert words in message and "mix.jsonl:2" in message


@pytest.mark.parametrize(
    "message",
    [
        {"role": "\ud800", "content": "x"},
        {"role": "user", "content": ["\ud800"]},
        {"role": "user", "content": "x", "name": "\ud800"},
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, message: dict
) -> None:
    """A traceback out of the tokenizer for a role or a name, without the line to mend."""
    tokenizer.save_pretrained(tmp_path / "model")
    for template in (CHATML, MARKED):
        template = "{{ messages[0]['name'] }}" + template.replace("m['content']", "m['content'] | string")
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [message, {"role": "assistant", "content": "y"}]}))
        told = refusal(splits_of, tmp_path, "chat.jsonl", template)
        assert "chat.jsonl:1: 'messages' holds half of a surrogate pair" in told


def test_messages_with_times_are_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A traceback out of a hash for a column that is no JSON."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tokenizer.save_pretrained(tmp_path / "model")
    said_at = [{**message, "at": datetime.datetime(2024, 1, 2), "raw": b"\xff"} for message in MESSAGES]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said_at}]), tmp_path / "chat.parquet")
    samples = splits_of(tmp_path, "chat.parquet", CHATML).train
    assert isinstance(samples, PackedSamples) and "Hi — you." in tokenizer.decode(samples.stream)


def test_chats_without_an_assistant_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A run of a night that learns from no token."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 50}]}))
    with pytest.raises(
        InputError, match=r"nothing to learn from: 1 × chat without a word of the assistant's .*chat\.jsonl:1"
    ):
        splits_of(tmp_path, "chat.jsonl", CHATML)


@pytest.mark.parametrize(
    ("template", "mark"),
    [
        (CHATML, "<|im_end|>"),
        (MARKED, "<|im_end|>"),
        (TRIMMED, "<|eot|>"),
        (INSTRUCT, "</s>"),
        (PLAIN, None),
        (QWEN3, "<|im_end|>"),
        (R1, "<|eot|>"),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m['content'][:3] }}{% endfor %}", None),
    ],
)
def test_the_end_of_a_turn_is_the_template_s(
    tokenizer: PreTrainedTokenizerFast, template: str, mark: str | None
) -> None:
    """A model whose config names one end of text, and its template another: answers that go on for both sides."""
    wanted = None if mark is None else tokenizer.convert_tokens_to_ids(mark)
    assert ChatTemplate(tokenizer, template).end_of_turn_id() == wanted


@pytest.mark.parametrize(
    ("template", "beginning", "end"),
    [
        (CHATML, "<|im_start|>user\n", "<|im_end|>"),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>",
        ),
        (INSTRUCT, "[INST]", "[/INST]"),
        ("Title: {{ messages[0]['content'] }}\n" + PLAIN, "Title: Is it so?\n### user\n", "### assistant"),
        (PLAIN, "### user\n", "### assistant"),
        (R1, "[INST]", "<|im_start|>"),
    ],
)
def test_a_user_s_turn_is_what_the_template_has_around_it(
    tokenizer: PreTrainedTokenizerFast, template: str, beginning: str, end: str
) -> None:
    """Prompts of the model's own that it writes as something else than a user, and that never end."""
    assert ChatTemplate(tokenizer, template).user_turn() == (beginning, end)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "does not show a user's message as it is"),
        ("{% for m in messages %}{{ 'Q: ' + m['content'] + '\n' }}{% endfor %}", "nothing behind a user's message"),
    ],
)
def test_a_template_without_a_user_s_turn_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, words: str
) -> None:
    """Prompts written behind the whole of a rendered chat; hours of prompts that never end."""
    with pytest.raises(InputError, match=rf"{words}.*give another with --chat-template"):
        ChatTemplate(tokenizer, template).user_turn()
