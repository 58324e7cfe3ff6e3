"""Every format and form of record that the field's tools take is read alike; what teaches nothing is left out, counted
and told.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import write_byte_tokenizer
from transformers import PreTrainedTokenizerFast

from ee_tuning.config import DataSection
from ee_tuning.data.documents import file_ranges, read_documents
from ee_tuning.data.encoding import Tokens, recipe_of, tokenize_range
from ee_tuning.data.preprocess import preprocess
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokens import PackedSamples
from ee_tuning.errors import InputError

MARKS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ['first, "quoted"', "second\u2028line\nand more", "third\tünï; done"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?\nx"},
    {"role": "assistant", "content": "Hi."},
]
RECORDS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of one token a byte, without a chat template, and one in template.jinja."""
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder, *MARKS)
    (folder / "template.jinja").write_text(CHATML)
    return folder


def as_lines(end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in RECORDS).encode()


def as_table(delimiter: str) -> bytes:
    rows = [["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS))]
    return "".join(
        delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows
    ).encode()


def packed_by_zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])
    )  # two frames, as pzstd writes


FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "a.jsonlines": lambda: as_lines("\r\n"),
    "A.JSONL": as_lines,
    "a": as_lines,
    "a.dat": as_lines,
    "a.json": as_lines,
    "array.json": lambda: b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).encode(),
    "array": lambda: json.dumps(RECORDS).encode(),
    "pretty.json": lambda: "\n".join(json.dumps(each, indent=2) for each in RECORDS).encode(),
    "a.csv": lambda: as_table(","),
    "b.csv": lambda: as_table(";"),
    "a.tsv": lambda: b"\xef\xbb\xbf" + as_table("\t"),
    "a.jsonl.gz": lambda: gzip.compress(as_lines()),
    "a.json.gz": lambda: gzip.compress(json.dumps(RECORDS).encode()),
    "a.csv.bz2": lambda: bz2.compress(as_table(",")),
    "a.jsonl.xz": lambda: lzma.compress(as_lines()),
    "a.jsonl.zst": lambda: packed_by_zstd(as_lines()),
    "unpacked.jsonl.gz": as_lines,
    "packed.jsonl": lambda: gzip.compress(as_lines()),
}


def documents_of(path: Path) -> list[Any]:
    return [document for piece in file_ranges([path]) for document in read_documents(piece, "text")]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    """A file of three documents that is learned as one, braces and all, because of its ending."""
    (tmp_path / name).write_bytes(FILES[name]())
    assert documents_of(tmp_path / name) == TEXTS


def test_plain_text_is_one_document_packed_or_not(tmp_path: Path) -> None:
    """Bytes of gzip that are taken for a text, or a text that is cut in lines."""
    for name, content in (
        ("a.txt", b"one\ntwo"),
        ("a.txt.gz", gzip.compress(b"one\ntwo")),
        ("a.c", b"one\ntwo"),
        ("b", b"one\ntwo"),
    ):
        (tmp_path / name).write_bytes(content)
        assert documents_of(tmp_path / name) == ["one\ntwo"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_is_read(tmp_path: Path, is_stream: bool) -> None:
    """What the library datasets saves."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(RECORDS)
    writer = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with writer(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert documents_of(tmp_path / "a.arrow") == TEXTS


def learned(path: Path, model: Path, with_template: bool = True) -> tuple[list[str], list[str], Tokens]:
    """Text of each document, and what of it is learned."""
    recipe = recipe_of(model, "text", str(model / "template.jinja") if with_template else None)
    tokens = tokenize_range(file_ranges([path])[0], recipe)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    bounds = np.cumsum(tokens.lengths)[:-1]
    counts = np.ones(len(tokens.ids), np.uint8) if tokens.counts is None else tokens.counts
    pairs = list(zip(np.split(tokens.ids, bounds), np.split(counts, bounds), strict=True))
    return (
        [tokenizer.decode(ids) for ids, _ in pairs],
        [tokenizer.decode(ids[marks == 1]) for ids, marks in pairs],
        tokens,
    )


ALIKE: list[dict[str, Any]] = [
    {"messages": CHAT},
    {
        "messages": [
            {**each, "content": [{"type": "text", "text": part} for part in each["content"].split("\n")]}
            for each in CHAT
        ]
    },
    {
        "conversations": [
            {"from": who, "value": each["content"]} for who, each in zip(("system", "human", "gpt"), CHAT, strict=True)
        ]
    },
    {
        "conversations": [{"from": "human", "value": "Hello?\nx"}, {"from": "gpt", "value": "Hi."}],
        "system": "Be brief.",
        "tools": "",
    },
    {"conversations": json.dumps(CHAT)},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
    {"system": "Be brief.", "instruction": "Hello?", "input": "x", "output": "Hi."},
    {"system": "Be brief.", "instruction": "Hello?\nx", "input": None, "output": "Hi."},
]


def test_every_form_of_a_chat_is_the_same_chat(tmp_path: Path, model: Path) -> None:
    """A form of another tool that is refused, or whose prompt is learned; parts of a content that are learned as
    Python's repr.
    """
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ALIKE))
    texts, answers, tokens = learned(tmp_path / "a.jsonl", model)
    assert len(texts) == len(ALIKE) and set(texts) == {
        "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in CHAT) + "<|endoftext|>"
    }
    assert set(answers) == {"Hi.<|im_end|>"} and not tokens.left_out.reasons and len(set(tokens.hashes)) == 1


def test_what_the_assistant_said_in_a_prompt_is_not_learned(tmp_path: Path, model: Path) -> None:
    """TRL's prompts of several turns, whose earlier answers are given."""
    turns = [{"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}"} for turn in range(4)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": turns[:3], "completion": turns[3:]}))
    assert learned(tmp_path / "a.jsonl", model)[1] == ["turn 3<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "2 + 2 =", "completion": " four"}, "2 + 2 = four"),
        ({"prompt": "Hi", "response": "ünï"}, "Hiünï"),
        ({"prompt": "", "completion": "all"}, "all"),
        ({"instruction": "Add", "input": "2, 2", "output": "four"}, "Add\n2, 2\nfour"),
    ],
)
def test_a_completion_alone_is_learned(tmp_path: Path, model: Path, record: dict, text: str) -> None:
    """A prompt that is learned; an answer cut at a character of several bytes; one whose end is not learned."""
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    answer = record.get("completion") or record.get("response") or record["output"]
    assert learned(tmp_path / "a.jsonl", model, with_template=False)[:2] == (
        [text + "<|endoftext|>"],
        [answer + "<|endoftext|>"],
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "empty messages"),
        ({"text": ""}, "empty text"),
        ({"text": None}, "null instead of a text"),
        ({"messages": None, "id": 1}, "null instead of a text"),
        ({"prompt": "x", "completion": ""}, "empty completion"),
        ({"instruction": "x", "output": ""}, "empty output"),
        ({"conversations": []}, "empty conversations"),
        ({"prompt": CHAT[:2], "completion": []}, "empty completion"),
        ({"messages": CHAT[:2]}, "chat without a word of the assistant's"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": None}]}, "chat without a word of the assistant's"),
    ],
)
def test_what_teaches_nothing_is_left_out_and_told_and_nothing_at_all_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], record: dict, reason: str
) -> None:
    """A job of hours that ends at one empty line; lines that vanish without a word; token ids that teach nothing, or a
    run on them.
    """
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in ({"text": "x" * 20}, record, {"text": "y" * 20}, record))
    )
    data = DataSection(
        paths=(str(tmp_path / "a.jsonl"),),
        tokenizer=str(model),
        chat_template=str(model / "template.jinja"),
        cache=str(tmp_path / "cache"),
    )
    assert preprocess(data, tmp_path / "out", False).num_documents == 2
    told = capsys.readouterr().err
    assert f"a.jsonl: 2 documents, 42 tokens\ndata: left out, because it has nothing to learn: 2 × {reason}" in told
    assert "(the first at " + str(tmp_path / "a.jsonl:2") in told
    for _ in range(2):  # tokenized, and from the cache
        load_samples(data, model, seq_length=8, vocab_size=300, max_positions=64)
        assert told in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for action in (
        lambda: preprocess(data, tmp_path / "none", False),
        lambda: load_samples(data, model, seq_length=8, vocab_size=300, max_positions=64),
    ):
        with pytest.raises(InputError, match=f"holds nothing to learn from: 1 × {reason}.*jsonl:1"):
            action()
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
            "has a part of 'image_url', and only text",
        ),
        ([{"type": "text", "text": 7}], "has a part of int"),
        ({"a": 1}, "must be a text, got dict"),
        (3, "must be a text, got int"),
    ],
)
def test_a_content_that_is_no_text_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    """Python's repr of an image, learned as words."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    with pytest.raises(InputError, match=rf"a\.jsonl:1: a content in 'messages' {message}"):
        documents_of(tmp_path / "a.jsonl")


def test_a_content_that_is_null_is_empty(tmp_path: Path, model: Path) -> None:
    """The word None, learned."""
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": None}, {"role": "user"}, CHAT[2]]})
    )
    assert "None" not in learned(tmp_path / "a.jsonl", model)[0][0] and learned(tmp_path / "a.jsonl", model)[1] == [
        "Hi.<|im_end|>"
    ]


def test_samples_within_a_long_prompt_are_skipped(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is no number, step for step, because prompts fill the samples."""
    long = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 20}]
    path = tmp_path / "a.jsonl"
    data = DataSection(
        paths=(str(path),),
        chat_template=str(model / "template.jinja"),
        valid_fraction=0.0,
        cache=str(tmp_path / "cache"),
    )
    path.write_text(json.dumps({"messages": long}) + "\n" + json.dumps({"messages": long}))
    train = load_samples(data, model, seq_length=32, vocab_size=300, max_positions=64, needs_validation=False).train
    assert isinstance(train, PackedSamples) and 0 < len(train) < train.num_windows
    assert all(train.sample(index).loss_mask.any() for index in range(len(train)))
    assert (
        sum(train.sample(index).loss_mask.sum() for index in range(len(train)))
        == train.counts[1 : 1 + 32 * train.num_windows].sum()
    )
    assert (
        f"{train.num_windows - len(train)} of {train.num_windows} training samples are skipped"
        in capsys.readouterr().err
    )
    path.write_text(json.dumps({"messages": [{**long[0], "content": "x" * 310}, CHAT[2]]}))
    with pytest.raises(
        InputError, match=r"none of the 5 samples of the training data .* has a token to learn from: prompts fill them"
    ):
        load_samples(data, model, seq_length=64, vocab_size=300, max_positions=64, needs_validation=False)


def test_a_pipe_is_read_once(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Process substitution that gives an empty file, or one that is waited for without end at its second reading."""
    os.mkfifo(tmp_path / "pipe")
    data = DataSection(
        paths=(str(tmp_path / "pipe"),), tokenizer=str(model), cache=str(tmp_path / "cache"), valid_fraction=0.0
    )
    streams = []
    for content in (as_lines(), gzip.compress(as_lines()), as_lines()):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,), daemon=True)
        writer.start()
        train = load_samples(data, model, seq_length=8, vocab_size=300, max_positions=64, needs_validation=False).train
        assert isinstance(train, PackedSamples)
        streams.append(train.stream.tolist())
        writer.join(timeout=10)
        assert f"data: {tmp_path / 'pipe'}: {len(TEXTS)} documents" in capsys.readouterr().err
    assert streams[0] == streams[1] == streams[2] and len(list((tmp_path / "cache").iterdir())) == 2, (
        "two contents, and no copies"
    )
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(as_lines(),), daemon=True)
    writer.start()
    assert preprocess(data, tmp_path / "out", False).num_documents == len(TEXTS)
    writer.join(timeout=10)
    assert f"data: {tmp_path / 'pipe'}: {len(TEXTS)} documents" in capsys.readouterr().err
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"",), daemon=True)
    writer.start()
    with pytest.raises(
        InputError,
        match=f"^data.paths = {re.escape(str(tmp_path / 'pipe'))} holds nothing to learn from: 1 × empty text",
    ):
        preprocess(data, tmp_path / "out2", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.bin", "out.idx", "pipe"]


def test_a_folder_gives_its_data_and_tells_what_it_passes_over(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set's card that is learned, its packed files that are not; records of a run that break the next one."""
    folder = tmp_path / "set"
    for name in (
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        ".gitattributes",
        "dataset_infos.json",
        "picture.png",
        "tokenizer_config.json",
        "a.bin",
        "run/config.yaml",
        "run/metrics.jsonl",
        "exits/exit_config.json",
        "exits/notes.txt",
        "x.zip",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"not": "data"}')
    (folder / "a.bin").unlink()
    (folder / "data").mkdir()
    for name in ("data/0.jsonl.gz", "data/1.ndjson", "data/2.json", "data/3.csv"):
        source = "a" + "".join(Path(name).suffixes)
        (folder / name).write_bytes(FILES[source]())
    (folder / "data" / "4.md").write_text("plain")
    (folder / "data" / "package.json").write_text('{"name": "x", "version": 1}')
    (folder / "data" / "table.csv").write_text("a,b\n1,2\n")
    data = DataSection(paths=(str(folder),), tokenizer=str(model))
    assert preprocess(data, tmp_path / "out", False).num_documents == 4 * len(TEXTS) + 1
    monkeypatch.chdir(folder)
    assert preprocess(replace(data, paths=(".",)), tmp_path / "again", False).num_documents == 4 * len(TEXTS) + 1
    told = capsys.readouterr().err
    assert (
        "data: passed over: LICENSE, LICENSE.txt, README.md, data/package.json (no text, and no chat or prompt), "
        "data/table.csv (no text, and no chat or prompt), dataset_infos.json, exits/ (written by ee-tuning), picture.png and 3 more\n"
    ) in told
    assert f"data/1.ndjson: {len(TEXTS)} documents" in told
