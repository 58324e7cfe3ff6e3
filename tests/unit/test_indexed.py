"""Megatron's .bin and .idx, alone and blended: what is written, what is read, in which order, and what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer

from ee_tuning.config import DataSection, TuningSection
from ee_tuning.data.indexed import open_stream, write_index
from ee_tuning.data.loader import BatchSource, validation_batches
from ee_tuning.data.order import BlendedOrder
from ee_tuning.data.preprocess import preprocess
from ee_tuning.data.splits import _bounds, load_samples
from ee_tuning.data.tokens import Mixture, PackedSamples, Splits
from ee_tuning.errors import InputError

TEXTS = [f"document number {number} " * (number % 7 + 1) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    """By Megatron-core's own builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def load(
    tokenizer: Path, *, seq_length: int = 8, vocab_size: int = VOCABULARY, needs_validation: bool = False, **data: Any
) -> Splits:
    """`load_samples` with small defaults."""
    data = {key: tuple(map(str, value)) if key.endswith("paths") else value for key, value in data.items()}
    return load_samples(
        DataSection(**data),
        tokenizer,
        seq_length=seq_length,
        vocab_size=vocab_size,
        max_positions=64,
        needs_validation=needs_validation,
    )


def test_megatron_core_reads_what_preprocess_writes(tmp_path: Path, tokenizer: Path) -> None:
    """An index that only its own writer understands."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    written = preprocess(
        DataSection(paths=(str(tmp_path / "texts.jsonl"),), tokenizer=str(tokenizer)), tmp_path / "a.b", False
    )
    dataset = IndexedDataset(str(tmp_path / "a.b"))
    ours = write_byte_tokenizer(tmp_path / "again")
    assert [dataset[index].tolist() for index in range(len(dataset))] == [[*ours.encode(text), END] for text in TEXTS]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1)) and dataset.index.dtype == np.uint16
    assert (written.num_documents, written.num_tokens) == (40, sum(len(text) + 1 for text in TEXTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx", "again", "texts.jsonl"]


@pytest.mark.slow
def test_tokens_are_the_same_however_many_processes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines lost or doubled where one piece of a file ends and the next begins; documents in the order in which
    processes ended.
    """
    monkeypatch.setattr(
        "ee_tuning.data.documents.RANGE_BYTES", 100
    )  # many lines are longer, many pieces begin at a line's first byte
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:30]))
    (tmp_path / "two.txt").write_text(TEXTS[30])
    for name, bytes_per_worker in (("alone", 10**9), ("together", 1)):
        monkeypatch.setattr("ee_tuning.data.tokenizing.BYTES_PER_WORKER", bytes_per_worker)
        data = DataSection(
            paths=(str(tmp_path / "one.jsonl"), str(tmp_path / "two.txt")), tokenizer=str(tokenizer), workers=2
        )
        preprocess(data, tmp_path / name, False)
    stream = open_stream(tmp_path / "alone")
    assert len(stream.starts) == 31 and len(stream.ids) == sum(len(text) + 1 for text in TEXTS[:31])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"alone{suffix}").read_bytes() == (tmp_path / f"together{suffix}").read_bytes()


def test_parquet_gives_what_jsonl_gives(tmp_path: Path, tokenizer: Path) -> None:
    """Row groups skipped; keys that a chat template finds and that are None."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [{"text": text, "messages": None} for text in TEXTS[:9]]
    rows += [
        {"text": None, "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": text}]}
        for text in TEXTS[9:12]
    ]
    rows[9]["messages"][0]["name"] = "Ann"  # a column of all messages, then
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=5)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template").write_text(
        "{% for m in messages %}{% if 'name' in m %}{{ m['name'] + ':' }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    for name in ("parquet", "jsonl"):
        data = DataSection(
            paths=(str(tmp_path / f"rows.{name}"),), tokenizer=str(tokenizer), chat_template=str(tmp_path / "template")
        )
        preprocess(data, tmp_path / name, False)
    for suffix in (".bin", ".idx", ".mask"):
        assert (tmp_path / f"jsonl{suffix}").read_bytes() == (tmp_path / f"parquet{suffix}").read_bytes()


def test_parquet_without_pyarrow_is_refused(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError out of the depth for a package that is optional."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'ee_tuning\[parquet\]'"):
        load(tokenizer, paths=[tmp_path / "rows.parquet"])


def test_a_run_reads_what_megatron_wrote(tmp_path: Path, tokenizer: Path) -> None:
    """Another type of ids, or documents of several sequences, read as noise."""
    documents = [[number] * (number + 3) for number in range(20)]
    for dtype in (np.int32, np.uint16, np.int64):
        prefix = write_with_megatron(tmp_path / dtype.__name__, documents, dtype)
        train = load(tokenizer, paths=[prefix], valid_fraction=0.0, eod_mask_loss=True).train
        assert isinstance(train, PackedSamples)
        assert train.stream.tolist() == [token for document in documents for token in document]
        assert train.starts is not None and train.starts.tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()


def test_the_split_is_megatrons(tmp_path: Path, tokenizer: Path) -> None:
    """Documents on another side of the split than in the pretraining run: validation on what was learned, or the test
    set learned.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    prefix = write_with_megatron(tmp_path / "corpus", [[number] * 30 for number in range(61)])
    for split in ("969,30,1", "70,20,10", "8,1.5,0.5", "90,10", "1,1"):
        splits = load(tokenizer, paths=[prefix], split=split, needs_validation=True)
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        for samples, bounds in zip((splits.train, splits.valid), matrix, strict=False):
            assert isinstance(samples, PackedSamples) and bounds is not None
            wanted = range(round(bounds[0] * 61), round(bounds[1] * 61))
            assert sorted(set(samples.stream.tolist())) == list(wanted)


def test_half_a_document_is_on_megatrons_side() -> None:
    """70,20,10 of 15 documents: 13.5 by one order of sums and a little less by another, so a test document learned."""
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    for split in ("70,20,10", "969,30,1", "8,1.5,0.5", "0.1,0.2,0.7", "1,1", "3"):
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        stops = [stop for _, stop in (bounds or (0.0, 1.0) for bounds in matrix[:2])]
        for count in range(1, 300):
            wanted = tuple(round(stop * count) for stop in stops)
            assert _bounds(count, DataSection(paths=("x",), split=split)) == wanted, (split, count)


def test_the_order_of_a_blend_is_megatrons_however_far_it_is_asked_for() -> None:
    """Weights that hold only at the end of a run of known length; samples that move when a run is made longer."""
    from megatron.core.datasets import helpers_cpp

    weights, sizes, length = [0.3, 0.6, 0.1], [50, 7, 200], 100_000
    corpus, place = np.empty(length, np.int16), np.empty(length, np.int64)
    helpers_cpp.build_blending_indices(corpus, place, np.array(weights), 3, length, False)
    order = BlendedOrder(sizes, [3, 6, 1], seed=7)
    chosen = [order.sample_at(position) for position in [*range(500), 99_999, *range(500, 2000)]]
    chosen.pop(500)
    firsts = np.array([0, 50, 57])
    assert all(
        firsts[corpus[position]] <= sample < firsts[corpus[position]] + sizes[corpus[position]]
        for position, sample in enumerate(chosen)
    )
    for index, size in enumerate(sizes):  # each epoch of each corpus holds every sample once
        own = [sample for sample in chosen if firsts[index] <= sample < firsts[index] + size]
        for start in range(0, len(own) - size, size):
            assert sorted(own[start : start + size]) == list(range(firsts[index], firsts[index] + size))


@pytest.mark.parametrize("weights", [[0.1] * 10, [0.1, 0.2, 0.3, 0.7], [3, 6, 1], [0.7, 1e-17, 0.1, 0.2] * 3])
def test_weights_of_a_blend_are_megatrons_to_the_bit(weights: list[float]) -> None:
    """Python's own sum, which rounds otherwise since 3.12: another order of samples than the same job has on 3.11."""
    from megatron.core.datasets.utils import normalize

    assert BlendedOrder([5] * len(weights), weights, seed=1)._weights.tolist() == normalize(weights)


def blend(tmp_path: Path, tokenizer: Path) -> Mixture:
    """Two corpora of distinct tokens, three to one."""
    for name, first in (("a", 0), ("b", 100)):
        write_with_megatron(tmp_path / name, [[first + number] * 40 for number in range(20)])
    train = load(tokenizer, paths=["3", tmp_path / "a", "1", tmp_path / "b"], valid_fraction=0.0).train
    assert isinstance(train, Mixture)
    return train


def test_a_blend_goes_on_under_other_replicas_without_repeat_or_skip(tmp_path: Path, tokenizer: Path) -> None:
    """A position that means another sample once the number of replicas changes."""
    samples = blend(tmp_path, tokenizer)

    def rows(dp: int, micro: int, num_steps: int, position: int = 0) -> list[list[list[int]]]:
        tuning = TuningSection(micro_batch_size=micro, global_batch_size=8)
        sources = [BatchSource(samples, tuning, dp=dp, dp_rank=rank, position=position) for rank in range(dp)]
        return [
            sorted(
                row
                for source in sources
                for _ in range(source.num_microbatches)
                for row in next(source).tokens.tolist()
            )
            for _ in range(num_steps)
        ]

    whole = rows(1, 1, 40)
    share = np.mean([token < 100 for step in whole for row in step for token in row])
    assert share == pytest.approx(0.75, abs=0.01)
    for dp, micro in ((1, 4), (2, 2), (4, 2), (2, 1)):
        assert rows(2, 2, 13) + rows(dp, micro, 27, position=13 * 8) == whole


def test_validation_of_a_blend_keeps_its_weights_and_takes_no_sample_twice(tmp_path: Path, tokenizer: Path) -> None:
    """A small corpus judged by again and again, or a large one by all that the small one leaves over."""
    for name, first, count in (("a", 0, 10), ("b", 100, 60)):
        write_with_megatron(tmp_path / name, [[first + number] * 40 for number in range(count)])
    splits = load(
        tokenizer, paths=["1", tmp_path / "a", "1", tmp_path / "b"], valid_fraction=0.5, needs_validation=True
    )
    batches = validation_batches(splits.valid, TuningSection(micro_batch_size=3, eval_iters=1000), dp=1, dp_rank=0)
    rows = [
        tuple(row)
        for batch in batches
        for row, mask in zip(batch.tokens.tolist(), batch.loss_mask.T, strict=True)
        if mask.any()
    ]
    from_a = sum(row[0] < 100 for row in rows)
    assert abs(2 * from_a - len(rows)) <= 1 and from_a == (5 * 40 - 1) // 8


def test_several_corpora_without_weights_are_one(tmp_path: Path, tokenizer: Path) -> None:
    """Only the first of several named files is read."""
    for name, first in (("a", 0), ("b", 100)):
        write_with_megatron(tmp_path / f"{name}", [[first + number] * 40 for number in range(20)])
    (tmp_path / "text.txt").write_text("x" * 100)
    samples = load(tokenizer, paths=[tmp_path], valid_fraction=0.0).train
    assert len(samples) == 2 * (799 // 8) + 100 // 8
    order = samples.order(3)
    assert sorted(order.sample_at(position) for position in range(len(samples))) == list(range(len(samples)))


def damage_length(prefix: Path) -> None:
    """The index tells of one token more."""
    content = bytearray(prefix.with_suffix(".idx").read_bytes())
    content[34:38] = struct.pack("<i", struct.unpack("<i", content[34:38])[0] + 1)
    prefix.with_suffix(".idx").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda prefix: prefix.with_suffix(".bin").write_bytes(prefix.with_suffix(".bin").read_bytes()[:-4]),
            "does not agree with",
        ),
        (damage_length, "does not agree with"),
        (lambda prefix: prefix.with_suffix(".bin").write_bytes(b""), "is empty"),
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "corpus.bin beside it, which is missing"),
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "corpus.idx beside it, which is missing"),
        (
            lambda prefix: prefix.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes()[:-9]),
            "no index of Megatron's",
        ),
        (
            lambda prefix: prefix.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes()[:20]),
            "no index of Megatron's",
        ),
        (lambda prefix: prefix.with_suffix(".idx").write_bytes(b""), "no index of Megatron's"),
        (lambda prefix: prefix.with_suffix(".idx").write_bytes(b"text" * 30), "no index of Megatron's"),
        (
            lambda prefix: write_index(prefix.with_suffix(".idx"), np.dtype(np.int32), np.full(20, -40)),
            "no index of Megatron's",
        ),
        (
            lambda prefix: prefix.with_suffix(".mask").write_bytes(b"\1" * 7),
            "must have a byte for each of the 800 tokens",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_tokens_is_refused(
    tmp_path: Path, tokenizer: Path, damage: Any, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Documents read from their neighbours' bytes, or a segmentation fault behind the end of the file."""
    prefix = write_with_megatron(tmp_path / "corpus", [[number] * 40 for number in range(20)])
    damage(prefix)
    with pytest.raises(InputError) as error:
        load(tokenizer, paths=[prefix])
    assert words in str(error.value) and "corpus" in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"paths": ["0.3", "a", "heavy", "b"]},
            "a weight above 0 before each path, such as 0.3 corpus_a 0.7 corpus_b, got 'heavy'",
        ),
        ({"paths": ["0.3", "a", "b"]}, "got 'b' where a weight belongs"),
        ({"paths": ["a", "0.3"]}, "got 'a' where a weight belongs"),
        ({"paths": ["0.3", "a", "0.7"]}, "the weight 0.7 has no path after it"),
        ({"paths": ["-1", "a", "2", "b"]}, "got '-1' where a weight belongs"),
        ({"paths": ["nan", "a", "2", "b"]}, "got 'nan' where a weight belongs"),
        ({"paths": ["1", "a", "2", "a"]}, "names no file that is not held out already, or named before"),
        ({"paths": ["a"], "vocab_size": 19}, "token ids must lie in 0..18, the model's vocabulary, but a.bin holds 19"),
        ({"paths": ["a"], "split": "90,high"}, "data.split must be up to three shares"),
        ({"paths": ["a"], "split": "0,1"}, "data.split must be up to three shares"),
        (
            {"paths": ["a"], "split": "1,0", "needs_validation": True},
            "validation needs held-out data, got data.split = 1,0",
        ),
        ({"paths": ["text.txt"], "split": "9,1"}, "data.split = 9,1 divides only documents of .bin and .idx"),
        ({"paths": ["0.5", "a", "0.5", "text.txt"], "split": "9,1"}, ".idx, and data.paths names the text text.txt"),
        (
            {"paths": ["a"], "split": "9,1", "valid_paths": ["b"]},
            "data.split and data.valid_paths both say what is held out, got 9,1 and b",
        ),
        ({"paths": ["a"], "workers": -2}, "data.workers must be at least 0, got -2"),
        ({"paths": ["a"], "seq_length": 65}, "tuning.seq_length must lie in 1..64"),
    ],
)
def test_settings_of_corpora_that_can_not_be_used_are_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, words: str
) -> None:
    """A weight taken for a file, or an index out of range in the middle of a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_with_megatron(Path(name), [[number] * 40 for number in range(20)])
    Path("text.txt").write_text("some text, some text")
    with pytest.raises(InputError) as error:
        load(tokenizer, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "data.tokenizer must name"),
        ({"tokenizer": True, "paths": ("1", "text.txt")}, "preprocess takes no weights, got 1 for text.txt"),
        ({"tokenizer": True, "paths": ("a",)}, "a.bin holds token ids already"),
        ({"tokenizer": True, "workers": -1}, "data.workers must be at least 0, got -1"),
        ({"tokenizer": True, "paths": ("empty.txt",)}, "holds nothing to learn from"),
        ({"tokenizer": True, "output": "a"}, "a.bin exists already"),
        ({"tokenizer": True, "output": "new.bin"}, "--output is the prefix"),
        ({"tokenizer": True, "output": "."}, "give corpus"),
        ({"tokenizer": True, "paths": ("text.txt", "latin.txt")}, "latin.txt must be UTF-8 text"),
    ],
)
def test_preprocess_refuses_and_leaves_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, words: str
) -> None:
    """Half a corpus that looks like a whole one."""
    monkeypatch.chdir(tmp_path)
    write_with_megatron(Path("a"), [[1, 2, 3]])
    Path("text.txt").write_text("some text")
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    there = sorted(path.name for path in tmp_path.iterdir())
    output = Path(settings.get("output", "new"))
    settings = {
        key: str(tokenizer) if key == "tokenizer" else value for key, value in settings.items() if key != "output"
    }
    with pytest.raises(InputError) as error:
        preprocess(DataSection(**{"paths": ("text.txt",), **settings}), output, False)
    assert words in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == there


def test_preprocess_replaces_all_of_what_was_there(tmp_path: Path, tokenizer: Path) -> None:
    """Texts that are masked by the mask of the chats that were there before."""
    write_with_megatron(tmp_path / "a", [[1, 2, 3]])
    (tmp_path / "a.mask").write_bytes(b"\0\0\1")
    (tmp_path / "text.txt").write_text("xyz")
    preprocess(DataSection(paths=(str(tmp_path / "text.txt"),), tokenizer=str(tokenizer)), tmp_path / "a", True)
    stream = open_stream(tmp_path / "a")
    assert len(stream.ids) == 4 and stream.counts is None
