"""Token ids are made once and kept, for as long as nothing they depend on changes."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_tokenizer import VOCABULARY, write_byte_tokenizer

from ee_tuning.config import DataSection
from ee_tuning.data import splits
from ee_tuning.data.cache import CacheEntry, _make_missing, get_or_build
from ee_tuning.data.tokens import PackedSamples
from ee_tuning.errors import InputError
from ee_tuning.progress import ByteProgress


@pytest.fixture
def corpus(tmp_path: Path) -> DataSection:
    """Two documents, a tokenizer, and a cache of their own."""
    write_byte_tokenizer(tmp_path / "tokenizer")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}. " * 5)
    return DataSection(
        paths=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt")),
        tokenizer=str(tmp_path / "tokenizer"),
        cache=str(tmp_path / "cache"),
        valid_fraction=0.0,
    )


def load(data: DataSection) -> PackedSamples:
    """The training samples."""
    train = splits.load_samples(
        data, "none", seq_length=8, vocab_size=VOCABULARY + 1, max_positions=64, needs_validation=False
    ).train
    assert isinstance(train, PackedSamples)
    return train


def test_tokens_are_made_once(corpus: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of tokenizing again at each resumption; ids held in the memory of every process."""
    first = load(corpus).stream.tolist()
    monkeypatch.setattr(splits, "tokenize_files", lambda *_: pytest.fail("tokenized again"))
    again = load(corpus).stream
    assert again.tolist() == first and again.base is not None and not again.flags.writeable


@pytest.mark.parametrize("change", ["text", "time", "tokenizer", "template", "key", "files"])
def test_tokens_are_made_anew_where_something_changed(corpus: DataSection, tmp_path: Path, change: str) -> None:
    """Tokens of a text, or of a tokenizer, that was corrected since."""
    from ee_tuning.config import Config, replace

    load(corpus)
    changed: dict[str, object] = {}
    if change == "text":
        (tmp_path / "a.txt").write_text("another text of a. " * 5)
    elif change == "time":
        os.utime(tmp_path / "b.txt", (1, 1))
    elif change == "tokenizer":
        write_byte_tokenizer(tmp_path / "tokenizer", "text")
    elif change == "template":
        (tmp_path / "template").write_text("{{ messages }}")
        changed["chat_template"] = str(tmp_path / "template")
    elif change == "key":
        changed["text_key"] = "body"
    else:
        changed["paths"] = corpus.paths[::-1]
    before = set((tmp_path / "cache").iterdir())
    stream = load(replace(Config(data=corpus), data=changed).data).stream
    assert len(set((tmp_path / "cache").iterdir()) - before) == 1
    assert (VOCABULARY in stream) == (change == "tokenizer")


def test_a_refused_document_leaves_nothing_behind(corpus: DataSection, tmp_path: Path) -> None:
    """Half an entry that the next run takes for a whole one."""
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="must be UTF-8"):
        load(corpus)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_can_not_be_written_is_named(corpus: DataSection, tmp_path: Path) -> None:
    """A traceback for a full or a write-protected disk."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cache.* can not be written"):
        load(corpus)


def test_two_runs_that_begin_at_a_time_make_an_entry_once(tmp_path: Path) -> None:
    """The second run removes what the first is writing, or tokenizes a terabyte along with it."""
    made, meet = [], threading.Barrier(2)

    def make(folder: Path, progress: ByteProgress) -> Iterator[None]:
        made.append(folder)
        for step in range(3):
            time.sleep(0.02)
            (folder / str(step)).touch()
            yield

    def run() -> None:
        meet.wait()
        (folder,) = get_or_build([CacheEntry(depends_on=lambda: {"on": "nothing"}, make=make)], tmp_path, None)
        assert len(list(folder.iterdir())) == 3

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(list(tmp_path.iterdir())) == 1


def test_who_waits_at_a_lock_that_was_removed_waits_at_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waited for one that failed gets the lock of a file that is gone, and makes what a third one is
    making.
    """
    monkeypatch.setattr("time.sleep", lambda _: None)
    made = []

    def make(folder: Path, progress: ByteProgress) -> Iterator[None]:
        made.append(folder)
        yield

    lock = tmp_path / "entry.lock"
    second, third = (
        _make_missing(
            [CacheEntry(depends_on=dict, make=make)], [tmp_path / "entry"], tmp_path, ByteProgress("", is_shown=False)
        )
        for _ in range(2)
    )
    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        next(second)
        lock.unlink()
    next(third)
    assert len(made) == 1
    next(second)
    assert len(made) == 1 and list(third) == [] == list(second)
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_what_no_run_has_asked_for_in_months_goes(corpus: DataSection, tmp_path: Path) -> None:
    """A cache that grows for ever; or one that loses what runs use, or what is not its own."""
    cache = tmp_path / "cache"
    load(corpus)
    (ours,) = cache.iterdir()
    (cache / ("0" * 32)).mkdir()
    (cache / "thesis").mkdir()
    for path in cache.iterdir():
        os.utime(path, (1, 1))
    load(corpus)
    assert len(list(cache.iterdir())) == 3 and ours.stat().st_mtime > time.time() - 60, "what is used is young again"
    (tmp_path / "a.txt").write_text("another text of a. " * 5)
    load(corpus)
    assert (
        len(list(cache.iterdir())) == 3
        and ours.exists()
        and (cache / "thesis").exists()
        and not (cache / ("0" * 32)).exists()
    )
