"""Turns the config's section `data` into training and validation samples: tokenized once, cached, mapped and packed."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ee_tuning.config import DataSection
from ee_tuning.data.cache import CacheEntry, cache_root, file_stamps, get_or_build
from ee_tuning.data.encoding import recipe_of
from ee_tuning.data.indexed import BIN_SUFFIX, INDEX_SUFFIX, TokenStream, id_range, open_stream, with_suffix
from ee_tuning.data.piped import pipes_copied
from ee_tuning.data.sources import Corpus, find_corpora
from ee_tuning.data.tally import FileCount, nothing_to_learn, print_counts, print_passed_over, print_skipped
from ee_tuning.data.tokenizing import check_workers, tokenize_files
from ee_tuning.data.tokens import (
    DocumentRules,
    DocumentSamples,
    Mixture,
    PackedSamples,
    Samples,
    Splits,
    learned_windows,
)
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import ByteProgress
from ee_tuning.storage.apart import check_apart

_TRAIN, _VALID = "train", "valid"
_ID_RANGE, _FILES = "extremes.json", "files.json"


@dataclass(frozen=True)
class _Streams:
    """The documents of one corpus."""

    corpus: Corpus
    train: list[TokenStream]
    valid: list[TokenStream]
    counts: list[FileCount]
    """Counts of each text file."""


def load_samples(
    data: DataSection,
    model_path: str | Path,
    *,
    seq_length: int,
    vocab_size: int,
    max_positions: int,
    needs_validation: bool = True,
    topology: Topology | None = None,
    trusts_code: bool = False,
    by_document: bool = False,
    shown_as: str | None = None,
) -> Splits:
    """Reads, tokenizes, splits and packs the data of `data`, the same on every rank. All ranks of `topology` call it.

    The tokenizer is data.tokenizer, or the one in `model_path`; its own Python files run if `trusts_code`. Held out are
    data.valid_paths (files that are also in data.paths are then not trained on), or else a share of the documents. With
    `by_document`, each sample is the beginning of one document, of at most `seq_length` inputs. Errors call data.paths
    `shown_as`, where a user knows them by another name.

    Raises InputError on unusable paths, weights, files, lines or tokenizers, ids beyond `vocab_size`, `seq_length`
    beyond `max_positions`, a split shorter than one sample, and a missing validation split where `needs_validation`.
    """
    check_data_settings(data, seq_length, max_positions, needs_validation)
    check_apart(cache_root(data.cache), (*data.paths, *data.valid_paths), "data.cache")
    with pipes_copied(data, cache_root(data.cache), topology) as data:
        return _load(
            data,
            Path(data.tokenizer or model_path),
            seq_length,
            vocab_size,
            needs_validation,
            topology,
            trusts_code,
            by_document,
            shown_as,
        )


def _load(
    data: DataSection,
    tokenizer: Path,
    seq_length: int,
    vocab_size: int,
    needs_validation: bool,
    topology: Topology | None,
    trusts_code: bool,
    by_document: bool,
    shown_as: str | None,
) -> Splits:
    valid_corpora = find_corpora(data.valid_paths, "data.valid_paths", data.text_key) if data.valid_paths else []
    corpora = find_corpora(data.paths, "data.paths", data.text_key, leave_out=valid_corpora)
    if data.split and (texts := [path for corpus in corpora for path in corpus.texts]):
        raise InputError(
            f"data.split = {data.split} divides only documents of .bin and .idx, and data.paths names the text "
            f"{shown_as or texts[0]}; set data.valid_fraction instead, or preprocess the texts"
        )
    if shown_as is not None:
        corpora = [dataclasses.replace(corpus, name=shown_as) for corpus in corpora]
    wanted = [(corpus, not data.valid_paths) for corpus in corpora]
    wanted += [(corpus, False) for corpus in valid_corpora if needs_validation]
    entries = [
        entry for corpus, is_split in wanted for entry in _entries(corpus, data, tokenizer, is_split, trusts_code)
    ]
    folders = iter(get_or_build(entries, cache_root(data.cache), topology))
    streams = [_open(corpus, folders, data, tokenizer, vocab_size, is_split) for corpus, is_split in wanted]
    if topology is None or topology.is_logging_rank:
        print_passed_over([name for each in streams for name in each.corpus.passed_over])
        print_counts([count for each in streams for count in each.counts])
    splits = _splits(streams[: len(corpora)], streams[len(corpora) :], data, seq_length, needs_validation, by_document)
    if topology is None or topology.is_logging_rank:
        print_skipped("training", splits.train)
        print_skipped("validation", splits.valid)
    return splits


def _splits(
    streams: Sequence[_Streams],
    valid_streams: Sequence[_Streams],
    data: DataSection,
    seq_length: int,
    needs_validation: bool,
    by_document: bool,
) -> Splits:
    train = _pack(
        [(each, each.train) for each in streams], data, seq_length, by_document, "data.paths", "training data"
    )
    if not needs_validation:
        return Splits(train=train, valid=None)
    if data.valid_paths:
        judged = [(each, each.train) for each in valid_streams]
        return Splits(
            train=train, valid=_pack(judged, data, seq_length, by_document, "data.valid_paths", "validation data")
        )
    judged = [(each, each.valid) for each in streams]
    part = f"split {data.split}" if data.split else f"{data.valid_fraction:g}"
    return Splits(
        train=train,
        valid=_pack(
            judged, data, seq_length, by_document, "data.paths", "validation data", f"{part} of the documents of "
        ),
    )


def _entries(
    corpus: Corpus, data: DataSection, tokenizer: Path, is_split: bool, trusts_code: bool
) -> Iterator[CacheEntry]:
    """Returns a corpus's cache entries: the tokens of its texts, and the range of its ids."""
    if corpus.texts:
        recipe = recipe_of(tokenizer, data.text_key, data.chat_template, trusts_code=trusts_code)
        fraction = data.valid_fraction if is_split else 0.0

        def tokenize(folder: Path, progress: ByteProgress) -> Iterator[None]:
            outputs = (folder / _TRAIN, folder / _VALID)
            tokenized = yield from tokenize_files(
                corpus.texts, recipe, folder, outputs, fraction, data.workers, progress
            )
            (folder / _ID_RANGE).write_text(
                to_json([0, max(each.largest for each in tokenized.outputs)]), encoding="utf-8"
            )
            (folder / _FILES).write_text(to_json([count.as_tree() for count in tokenized.files]), encoding="utf-8")

        yield CacheEntry(
            make=tokenize,
            depends_on=lambda: {
                **dataclasses.asdict(recipe),
                "tokenizer": "",
                "files": file_stamps(corpus.texts),
                "valid_fraction": fraction,
            },
        )
    for prefix in corpus.prefixes:

        def scan(folder: Path, progress: ByteProgress, prefix: Path = prefix) -> Iterator[None]:
            stream = open_stream(prefix)
            progress.expect(stream.ids.nbytes)
            smallest, largest = 0, 0
            for low, high, num_bytes in id_range(stream):
                smallest, largest = min(smallest, low), max(largest, high)
                progress.advance(num_bytes)
                yield
            (folder / _ID_RANGE).write_text(to_json([smallest, largest]), encoding="utf-8")

        files = [with_suffix(prefix, suffix) for suffix in (BIN_SUFFIX, INDEX_SUFFIX)]
        yield CacheEntry(make=scan, depends_on=partial(_id_stamps, files))


def _id_stamps(files: Sequence[Path]) -> dict[str, Any]:
    return {"ids": file_stamps(files)}


def _open(
    corpus: Corpus, folders: Iterator[Path], data: DataSection, tokenizer: Path, vocab_size: int, is_split: bool
) -> _Streams:
    """Opens the documents of a corpus, whose entries are the next of `folders`."""
    train, valid, counts = [], [], []
    if corpus.texts:
        folder = next(folders)
        counts = [FileCount.of_tree(tree) for tree in json.loads((folder / _FILES).read_text(encoding="utf-8"))]
        _check_vocabulary(
            folder,
            vocab_size,
            f"the tokenizer in {tokenizer} gave",
            "set data.tokenizer to the one that the model was trained with",
        )
        train, valid = (
            [open_stream(folder / part)] if with_suffix(folder / part, BIN_SUFFIX).stat().st_size else []
            for part in (_TRAIN, _VALID)
        )
    for prefix in corpus.prefixes:
        _check_vocabulary(
            next(folders),
            vocab_size,
            f"{with_suffix(prefix, BIN_SUFFIX)} holds",
            "tokenize its texts again with the model's tokenizer",
        )
        stream = open_stream(prefix)
        first, stop = _bounds(len(stream.starts), data) if is_split else (len(stream.starts),) * 2
        train.append(stream.documents(0, first))
        valid.append(stream.documents(first, stop))
    return _Streams(
        corpus, [each for each in train if len(each.ids)], [each for each in valid if len(each.ids)], counts
    )


def _bounds(num_documents: int, data: DataSection) -> tuple[int, int]:
    """Returns where the training documents of .bin and .idx end, and where the held-out ones end."""
    if data.split:
        # Sums as in Megatron-core, so that half a document is rounded as there, and alike on every Python.
        shares = np.array([*_shares(data.split), 0.0])
        first, stop = np.cumsum(shares / shares.sum())[:2] * num_documents
        return round(first), round(stop)
    num_valid = round(data.valid_fraction * num_documents)
    if data.valid_fraction and num_documents > 1:
        num_valid = min(max(num_valid, 1), num_documents - 1)
    return num_documents - num_valid, num_documents


def _shares(split: str) -> list[float]:
    """Parses the shares of training and validation as Megatron-core parses its `split`."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not 0 <= share < float("inf") for share in shares) or not shares[0] > 0:
        raise InputError(
            f"data.split must be up to three shares of at least 0, for training, validation and test, such as 969,30,1, got "
            f"{split!r}"
        )
    return shares


def check_data_settings(data: DataSection, seq_length: int, max_positions: int, needs_validation: bool) -> None:
    """Checks what `load_samples` checks, except for files. Raises InputError."""
    if not 1 <= seq_length <= max_positions:
        raise InputError(
            f"tuning.seq_length must lie in 1..{max_positions} (the model's max_position_embeddings), got {seq_length}"
        )
    if not 0 <= data.valid_fraction < 1:
        raise InputError(f"data.valid_fraction must be at least 0 and below 1, got {data.valid_fraction}")
    check_workers(data.workers)
    if data.split and data.valid_paths:
        raise InputError(
            f"data.split and data.valid_paths both say what is held out, got {data.split} and {', '.join(data.valid_paths)}; "
            "leave one of them out"
        )
    held_out = sum(_shares(data.split)[1:2]) if data.split else data.valid_fraction
    if needs_validation and not data.valid_paths and held_out == 0:
        given = f"data.split = {data.split}" if data.split else "data.valid_fraction = 0"
        raise InputError(
            f"validation needs held-out data, got {given} and no data.valid_paths; set one of them, or tuning.eval_iters to 0"
        )


def _check_vocabulary(folder: Path, vocab_size: int, who: str, remedy: str) -> None:
    smallest, largest = json.loads((folder / _ID_RANGE).read_text(encoding="utf-8"))
    if largest >= vocab_size or smallest < 0:
        raise InputError(
            f"token ids must lie in 0..{vocab_size - 1}, the model's vocabulary, but {who} "
            f"{largest if largest >= vocab_size else smallest}; {remedy}"
        )


def _pack(
    corpora: Sequence[tuple[_Streams, list[TokenStream]]],
    data: DataSection,
    seq_length: int,
    by_document: bool,
    key: str,
    what: str,
    share: str = "",
) -> Samples:
    """Packs the samples of one split: of one stream, of several, or by weight."""
    packed: list[Samples] = []
    for whole, streams in corpora:
        _check_size(whole, streams, 1 if by_document else seq_length, key, what, share)
        parts = [_samples_of(each, data, seq_length, by_document) for each in streams]
        if not any(map(len, parts)):
            num_windows = sum(part.num_windows for part in parts)
            raise InputError(
                f"none of the {num_windows} samples of the {what} ({share}{whole.corpus.name}) has a token to learn "
                "from: prompts fill them, or no message has the role assistant; give another "
                "tuning.seq_length, more chats, or mend the roles"
            )
        packed.append(parts[0] if len(parts) == 1 else Mixture(parts, None))
    weights = [whole.corpus.weight for whole, _ in corpora]
    return packed[0] if weights == [None] else Mixture(packed, [weight or 0.0 for weight in weights])


def _samples_of(stream: TokenStream, data: DataSection, seq_length: int, by_document: bool) -> Samples:
    if by_document:
        return DocumentSamples(stream.ids, stream.starts, seq_length, stream.counts)
    rules = DocumentRules.of(data)
    return PackedSamples(
        stream.ids,
        seq_length,
        stream.counts,
        stream.starts if rules != DocumentRules() else None,
        rules,
        learned_windows(stream.counts, seq_length),
    )


def _check_size(
    whole: _Streams, streams: Sequence[TokenStream], seq_length: int, key: str, what: str, share: str
) -> None:
    """Raises InputError where a weighted corpus has no sample."""
    name = whole.corpus.name
    num_tokens = sum(len(each.ids) for each in streams)
    if not num_tokens and share and (whole.train or whole.valid):
        raise InputError(
            f"{key} = {name} holds a single document, or copies of one, so none can be held out; give data.valid_paths or "
            "more documents, or set tuning.eval_iters to 0"
        )
    if not num_tokens:
        raise InputError(nothing_to_learn(key, name, whole.counts))
    if all(len(each.ids) <= seq_length for each in streams):
        remedy = "a larger data.valid_fraction, data.valid_paths, " if share else ""
        raise InputError(
            f"a sample takes tuning.seq_length + 1 = {seq_length + 1} tokens, but the {what} ({share}{name}) holds only "
            f"{num_tokens}; give more text, {remedy}or a shorter tuning.seq_length"
        )
