"""From files to micro-batches: what is read, what is held out, and in which order it is consumed."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer

from ee_tuning.config import DataSection, TuningSection
from ee_tuning.data.documents import file_ranges
from ee_tuning.data.encoding import document_hash, recipe_of, tokenize_range
from ee_tuning.data.loader import Batch, BatchSource, count_microbatches, validation_batches
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.data.tokenizing import held_out
from ee_tuning.data.tokens import PackedSamples, Samples, Splits
from ee_tuning.errors import InputError


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    return folder


def load(
    model: Path,
    *,
    seq_length: int = 4,
    vocab_size: int = VOCABULARY,
    max_positions: int = 64,
    needs_validation: bool = False,
    **data: Any,
) -> Splits:
    """`load_samples` with small defaults."""
    data = {key: tuple(map(str, value)) if key.endswith("paths") else value for key, value in data.items()}
    return load_samples(
        DataSection(**data),
        model,
        seq_length=seq_length,
        vocab_size=vocab_size,
        max_positions=max_positions,
        needs_validation=needs_validation,
    )


def texts_of(samples: Samples | None, model: Path) -> list[str]:
    """The documents of a split."""
    assert isinstance(samples, PackedSamples) and samples.stream[-1] == END
    return str(load_tokenizer(model).decode(samples.stream.tolist())).split("<|endoftext|>")[:-1]


def numbered(num_samples: int, seq_length: int = 3) -> PackedSamples:
    """Samples that tell their index: the token at place i is i."""
    return PackedSamples(np.arange(num_samples * seq_length + 1, dtype=np.int32), seq_length)


def sizes(micro: int, total: int, **more: Any) -> TuningSection:
    """Micro-batch and global batch size, and what else a test is about."""
    return TuningSection(micro_batch_size=micro, global_batch_size=total, **more)


def indices(batch: Batch, seq_length: int = 3) -> list[int]:
    """Which samples of `numbered` a batch holds, rows that only fill it left out."""
    return [int(row[0]) // seq_length for row, mask in zip(batch.tokens, batch.loss_mask.T, strict=True) if mask.any()]


def global_steps(
    samples: PackedSamples, tuning: TuningSection, dp: int, num_steps: int, position: int = 0
) -> list[list[int]]:
    """The samples of each step over all replicas, sorted."""
    sources = [BatchSource(samples, tuning, dp=dp, dp_rank=rank, position=position) for rank in range(dp)]
    steps = [
        sorted(index for source in sources for _ in range(source.num_microbatches) for index in indices(next(source)))
        for _ in range(num_steps)
    ]
    assert {source.position for source in sources} == {position + num_steps * tuning.global_batch_size}
    return steps


def test_reads_text_jsonl_and_folders_in_the_order_of_names(tmp_path: Path, model: Path) -> None:
    """The order that the file system lists names in would differ between ranks, and so would their samples."""
    folder = tmp_path / "corpus"
    (folder / "a").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n")
    (folder / "a" / "z.py").write_text("first ünï")
    (folder / "c.jsonl").write_text('{"text": "third", "more": 1}\n\n{"text": ""}\n{"text": "fourth\\u2028line"}')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "named.c").write_text("fifth")
    splits = load(model, paths=[folder, tmp_path / "named.c", folder / "b.txt"], valid_fraction=0.0)
    assert texts_of(splits.train, model) == ["first ünï", "second\r\n", "third", "fourth\u2028line", "fifth"]
    assert splits.valid is None


def test_samples_cover_the_stream_and_labels_are_the_next_token() -> None:
    """Windows that do not overlap by one would never learn the token between them."""
    rng = random.Random(0)
    for _ in range(30):
        seq_length, length = rng.randint(1, 9), rng.randint(10, 90)
        samples = PackedSamples(np.array([rng.randrange(100) for _ in range(length)], dtype=np.int32), seq_length)
        assert len(samples) == (length - 1) // seq_length
        labels = [token for sample in range(len(samples)) for token in samples.sample(sample).tokens[1:]]
        assert labels == samples.stream[1 : 1 + len(labels)].tolist() and length - 1 - len(labels) < seq_length
        batch = next(BatchSource(samples, sizes(2, 4), dp=1, dp_rank=0))
        assert batch.tokens.shape == (2, seq_length) and batch.labels.shape == batch.loss_mask.shape == (seq_length, 2)
        assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        assert torch.equal(batch.labels.T[:, :-1], batch.tokens[:, 1:]) and batch.loss_mask.all()


def test_tokens_of_a_batch_are_those_of_each_document_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents lost, or joined, where one tokenizer batch ends and the next begins."""
    monkeypatch.setattr("ee_tuning.data.encoding.BATCH_CHARACTERS", 10)
    texts = ["abc", "ünïcode text", "x" * 25, "de", "f"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(model)
    tokens = tokenize_range(file_ranges([tmp_path / "texts.jsonl"])[0], recipe_of(model, "text", None))
    documents = [part.tolist() for part in np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])]
    assert documents == [[*tokenizer.encode(text, add_special_tokens=False), END] for text in texts]
    assert len(set(tokens.hashes)) == len(texts) and tokens.counts is None


def test_documents_begin_as_the_tokenizer_begins_any_text(tmp_path: Path) -> None:
    """Exits learn texts without the beginning-of-text token that every prompt has; or with two, or with the end
    twice.
    """
    write_byte_tokenizer(tmp_path, "<s>", encloses=True)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "<s>de")))
    tokens = tokenize_range(file_ranges([tmp_path / "texts.jsonl"])[0], recipe_of(tmp_path, "text", None))
    begin = VOCABULARY
    a, b, c, d, e = load_tokenizer(tmp_path)("abcde", add_special_tokens=False)["input_ids"]
    assert tokens.ids.tolist() == [begin, a, b, c, END, begin, d, e, END] and tokens.lengths.tolist() == [5, 4]


def test_the_split_is_disjoint_stable_and_blind_to_files(tmp_path: Path, model: Path) -> None:
    """A held-out document that moves to training with a new file name or a new neighbour makes validation a lie."""
    texts = [f"document number {index}" for index in range(400)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[::-1][:300]))
    first = load(model, paths=[tmp_path / "one.jsonl"], text_key="body", valid_fraction=0.1, needs_validation=True)
    second = load(model, paths=[tmp_path / "two.jsonl"], text_key="body", valid_fraction=0.1, needs_validation=True)
    train, valid = set(texts_of(first.train, model)), set(texts_of(first.valid, model))
    assert train.isdisjoint(valid) and train | valid == set(texts) and 20 <= len(valid) <= 60
    assert set(texts_of(second.valid, model)) == valid & set(texts[100:])
    unvalidated = load(model, paths=[tmp_path / "one.jsonl"], text_key="body", valid_fraction=0.1)
    assert unvalidated.valid is None and set(texts_of(unvalidated.train, model)) == train


def test_the_hash_is_what_it_was() -> None:
    """Another hash in a later version would train on what earlier runs held out."""
    assert document_hash("") == int("e3b0c44298fc1c14", 16) / 2**64


def test_a_handful_of_documents_has_both_splits() -> None:
    """A fraction of 0.05 of three documents is none, and a run on three files would not start."""
    rng = random.Random(1)
    for _ in range(100):
        hashes = [rng.random() for _ in range(rng.randint(2, 5))]
        chosen = held_out(np.array(hashes), rng.choice([1e-9, 0.05, 0.999999999]))
        assert 0 < chosen.sum() < len(hashes)
    assert not held_out(np.array([0.5, 0.5]), 0.9).any() and not held_out(np.array([0.1, 0.2]), 0).any()


def test_files_held_out_by_name_are_not_trained_on(tmp_path: Path, model: Path) -> None:
    """A folder that contains the held-out file would teach it too."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}")
    same_file = tmp_path / ".." / tmp_path.name / "b.txt"
    splits = load(model, paths=[tmp_path], valid_paths=[same_file], valid_fraction=0.5, needs_validation=True)
    assert texts_of(splits.train, model) == ["the text of a", "the text of c"] and texts_of(splits.valid, model) == [
        "the text of b"
    ]


def test_a_step_holds_the_same_samples_under_every_layout() -> None:
    """Another number of replicas or another micro-batch size would train on other data."""
    for num_samples in (5, 40, 101):
        samples = numbered(num_samples)
        expected = global_steps(samples, sizes(1, 8), 1, 12)
        for dp, micro in ((1, 2), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)):
            assert global_steps(samples, sizes(micro, 8), dp, 12) == expected


def test_an_epoch_holds_every_sample_once_and_the_next_is_shuffled_anew() -> None:
    """Samples drawn with replacement, or one order for all epochs."""
    for num_samples, seed in ((12, 0), (33, -5), (48, 2**40)):
        source = BatchSource(numbered(num_samples), sizes(3, 3, seed=seed), dp=1, dp_rank=0)
        consumed = [index for _ in range(num_samples) for index in indices(next(source))]
        epochs = [consumed[start : start + num_samples] for start in range(0, len(consumed), num_samples)]
        assert all(sorted(epoch) == list(range(num_samples)) for epoch in epochs)
        assert epochs[0] != epochs[1] and epochs[0] != list(range(num_samples))


def test_seeds_give_different_orders() -> None:
    """A seed that is ignored."""
    assert (
        len({str(global_steps(numbered(50), sizes(1, 4, seed=seed), 1, 3)) for seed in (0, 1, -1, 2**32, 2**33)}) == 5
    )


def test_a_run_resumed_anywhere_goes_on_as_if_never_stopped() -> None:
    """A position rounded to a step or an epoch repeats or skips samples."""
    samples, tuning = numbered(29), sizes(2, 4)
    source = BatchSource(samples, tuning, dp=1, dp_rank=0)
    whole = [indices(next(source)) for _ in range(40)]
    for start in range(40):
        resumed = BatchSource(samples, tuning, dp=1, dp_rank=0, position=2 * start)
        assert [indices(next(resumed)) for _ in range(start, 40)] == whole[start:]


def test_a_resumed_run_may_have_other_replicas() -> None:
    """Positions counted per replica lose their meaning when the number of replicas changes."""
    samples = numbered(31)
    expected = global_steps(samples, sizes(1, 8), 1, 20)
    for dp, micro in ((1, 4), (2, 2), (4, 2)):
        assert (
            global_steps(samples, sizes(2, 8), 2, 7) + global_steps(samples, sizes(micro, 8), dp, 13, position=56)
            == expected
        )


def test_validation_judges_by_the_whole_split_under_every_layout() -> None:
    """Rows dropped to fit, or counted twice, give every number of replicas a validation loss of its own."""
    for num_samples in (1, 5, 16, 23):
        for dp, micro in ((1, 1), (1, 4), (2, 2), (4, 4), (8, 1)):
            tuning = sizes(micro, 32, eval_iters=50)
            replicas = [validation_batches(numbered(num_samples), tuning, dp=dp, dp_rank=rank) for rank in range(dp)]
            assert len({len(batches) for batches in replicas}) == 1 and len(replicas[0]) == -(
                -num_samples // (micro * dp)
            )
            assert all(batch.tokens.shape == (micro, 3) for batches in replicas for batch in batches)
            assert sorted(index for batches in replicas for batch in batches for index in indices(batch)) == list(
                range(num_samples)
            )


def test_validation_takes_as_many_microbatches_as_asked_and_always_the_same() -> None:
    """Losses of two validations could not be compared if their samples differed, by seed or by call."""
    chosen = {}
    for seed, dp in ((1, 1), (2, 1), (1, 2)):
        tuning = sizes(2, 4, eval_iters=3, seed=seed)
        replicas = [validation_batches(numbered(50), tuning, dp=dp, dp_rank=rank) for rank in range(dp)]
        assert [len(batches) for batches in replicas] == [3] * dp
        chosen[seed, dp] = sorted(index for batches in replicas for batch in batches for index in indices(batch))
    assert chosen[1, 1] == chosen[2, 1] and set(chosen[1, 1]) < set(chosen[1, 2]) and len(set(chosen[1, 2])) == 12
    assert validation_batches(numbered(5), sizes(1, 1, eval_iters=0), dp=1, dp_rank=0) == []
    assert validation_batches(None, sizes(1, 1), dp=1, dp_rank=0) == []


@pytest.mark.parametrize(
    ("micro", "total", "dp", "message"),
    [
        (4, 12, 2, "4 × 2 = 8, got 12; set it to 8 or 16"),
        (4, 2, 1, "got 2; set it to 4,"),
        (0, 8, 1, "micro_batch_size must be at least 1"),
        (4, 0, 1, "global_batch_size must be at least 1"),
    ],
)
def test_batch_sizes_that_do_not_divide_are_refused(micro: int, total: int, dp: int, message: str) -> None:
    """Rounding the number of micro-batches trains on another global batch than the one asked for."""
    with pytest.raises(InputError, match=message):
        count_microbatches(sizes(micro, total), dp)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "naïve".encode("latin-1"), r"latin\.txt must be UTF-8 text, got byte 0xef at offset 2"),
        ("broken.jsonl", b'{"text": "abcdef"}\n{"text": \n', r"broken\.jsonl:2: a line must be one JSON object"),
        ("bytes.jsonl", b'{"text": "\xff"}\n', r"bytes\.jsonl:1: a line must be one JSON object"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl:1: a line must be one JSON object"),
        ("list.jsonl", b'\n["abc"]\n', r"list\.jsonl:2: a line must be a JSON object, got list"),
        (
            "key.jsonl",
            b'{"body": "abc", "id": 1}\n',
            r"key\.jsonl:1: no key 'text', and no .*; its keys are 'body', 'id'; set data\.",
        ),
        ("number.jsonl", b'{"text": 7}\n', r"number\.jsonl:1: 'text' must be a text, got int"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', r"half\.jsonl:1: 'text' holds half of a surrogate pair"),
        (
            "cut.json",
            b'[{"text": "abc"},\n {"text": "de"}',
            r"cut\.json: its array has no end after record 2: the file is cut short",
        ),
        ("broken.json", b'[{"text": "abc"},\n {"text" "de"}]', r"broken\.json:2: it must be an array of JSON objects"),
        ("key.json", b'[{"text": "abc"}, {"body": ""}]', r"key\.json, record 2: no key 'text'"),
        (
            "key.csv",
            b"title,body\na,b\n",
            r"key\.csv:2: no key 'text'.* its keys are 'title', 'body'; set data\.text_key",
        ),
        ("cells.csv", b"id,text\n1,a\n2,b,c\n", r"cells\.csv:3: a row has 3 cells, and the first line names 2"),
        ("open.csv", b'id,text\n1,"a\n2,b\n', r"open\.csv:.* can not be read as a table"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "abc"}\n' * 99, mtime=0)[:-9],
            r"cut\.jsonl\.gz can not be read as gzip: .*copy it again",
        ),
        (
            "lines.txt",
            b'{"text": "abc"}\n{"text": "de"}\n',
            r"lines\.txt holds JSON lines, and its name promises plain text; name it \.jsonl",
        ),
        ("one.txt", b'\n{"text": "abc"}\n', r"one\.txt holds JSON lines"),
        ("wide.txt", "abc".encode("utf-16-le"), r"wide\.txt must be UTF-8 text, got a NUL byte at offset 1"),
        ("set.zip", b"PK", r"set\.zip: \.zip is no format that data are read from; unpack it"),
        ("set.pkl", b"", r"set\.pkl: \.pkl is no format .*write it as \.jsonl or \.parquet"),
        (
            "rows.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            r"rows\.parquet\.gz: parquet must not be compressed, and this is gzip; decompress it",
        ),
        (
            "lfs.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            r"lfs\.jsonl is a pointer of Git LFS",
        ),
        ("empty.txt", b"", r"empty\.txt holds nothing to learn from: 1 × empty text"),
        ("empty.jsonl", b"", r"empty\.jsonl holds no text"),
        ("short.txt", b"abc", r"training data \(.*short\.txt\) holds only 4; .*a shorter tuning\.seq_length"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(
    tmp_path: Path, model: Path, name: str, content: bytes, message: str
) -> None:
    """A traceback from a decoder does not say which of a thousand files to mend."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(model, paths=[tmp_path / name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": []}, r"data\.paths must name .* got none"),
        ({"paths": ["nowhere.txt"]}, r"data\.paths: nowhere\.txt does not exist"),
        ({"paths": ["empty_folder"]}, r"the folder .*empty_folder holds no"),
        ({"valid_paths": ["good.txt"]}, r"data\.paths = .*good\.txt names no file that is not held out already"),
        ({"valid_paths": ["short.txt"], "needs_validation": True}, r"validation data \(.*short\.txt\) holds only 2"),
        (
            {"needs_validation": True},
            r"good\.txt holds a single document, or copies of one, so none can be held out; give data\.valid_paths",
        ),
        (
            {"paths": ["good.txt", "short.txt"], "valid_fraction": 1e-9, "needs_validation": True},
            r"validation data \(1e-09 of the documents",
        ),
        (
            {"valid_fraction": 0.0, "needs_validation": True},
            r"validation needs held-out data, got data\.valid_fraction = 0",
        ),
        ({"valid_fraction": 1.0}, r"data\.valid_fraction must be at least 0 and below 1, got 1\.0"),
        ({"seq_length": 65}, r"tuning\.seq_length must lie in 1\.\.64 .*got 65"),
        ({"seq_length": 0}, r"tuning\.seq_length must lie in 1\.\.64"),
        (
            {"vocab_size": 256},
            r"0\.\.255, the model.s vocabulary, but the tokenizer in .* gave 256; set data\.tokenizer",
        ),
        ({"tokenizer": "nowhere"}, "there is no folder nowhere, and the Hugging Face hub can not be asked"),
        ({"tokenizer": "empty_folder"}, r"empty_folder has no tokenizer"),
        ({"tokenizer": "broken_folder"}, r"the tokenizer in broken_folder can not be read: .*; copy its files again"),
    ],
)
def test_settings_that_can_not_be_used_are_refused(
    tmp_path: Path, model: Path, settings: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would otherwise surface steps later as an index out of range, a loss of NaN, or a run without validation."""
    monkeypatch.chdir(tmp_path)
    Path("empty_folder").mkdir()
    Path("broken_folder").mkdir()
    Path("broken_folder/tokenizer.json").write_text("{")
    Path("good.txt").write_text("enough text for several samples")  # its hash lies above that of short.txt
    Path("short.txt").write_text("b")
    with pytest.raises(InputError, match=message) as caught:
        load(model, **{"paths": ["good.txt"], **settings})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, model: Path) -> None:
    """Documents would run into each other."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(InputError, match=r"must have an end-of-text token, got none; set eos_token"):
        load(model, paths=[tmp_path / "text.txt"], tokenizer=str(tmp_path))
