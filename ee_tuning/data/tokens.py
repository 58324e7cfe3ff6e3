"""Documents become token ids, and token ids become samples of equal length.

Every document is closed by the end-of-text token and laid into one stream per split. Sample i reads seq_length + 1 tokens from
i · seq_length on: neighbours overlap by one token, so each token but the stream's first is a label exactly once.
"""
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ee_tuning.config import DataSection
from ee_tuning.data.documents import find_files, read_documents
from ee_tuning.data.tokenizer import end_of_text_id, load_tokenizer
from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokenizer works on the documents of a batch in parallel, and its results as Python lists take some hundred bytes a token.
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class PackedSamples:
    """A stream of tokens, cut into samples."""

    stream: NDArray[np.int32]
    """[n] token ids of the documents, each closed by end of text."""
    seq_length: int

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_length

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """[seq_length + 1], a view: inputs are all but the last, labels all but the first."""
        assert 0 <= index < len(self)
        start = index * self.seq_length
        return self.stream[start: start + self.seq_length + 1]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What the heads learn from, and what they are judged by."""

    train: PackedSamples
    valid: PackedSamples | None
    """None where nothing is held out."""


def load_samples(data: DataSection, model_path: str | Path, *, seq_length: int, vocab_size: int, max_positions: int,
                 needs_validation: bool = True) -> Splits:
    """Reads, tokenizes, splits and packs what `data` names; equal on every rank that calls it.

    The tokenizer is data.tokenizer, or the one in `model_path`. Held out are data.valid_paths (files that data.paths name too are
    then not trained on), or else the documents that `held_out` chooses. Raises InputError on whatever can not be used: paths,
    files, lines, the tokenizer, ids beyond `vocab_size`, `seq_length` beyond `max_positions`, a split shorter than one sample, and no
    held-out part where `needs_validation`.
    """
    _check_settings(data, seq_length, max_positions, needs_validation)
    valid_files = find_files(data.valid_paths, "data.valid_paths") if data.valid_paths else []
    train_files = find_files(data.paths, "data.paths", leave_out=valid_files)
    tokenizer = load_tokenizer(data.tokenizer or model_path)
    documents, hashes = tokenize(read_documents(train_files, data.text_key), tokenizer)
    if not documents:
        raise InputError(f"data.paths = {', '.join(data.paths)} holds no text; give files that are not empty")
    chosen = held_out(hashes, 0 if data.valid_paths else data.valid_fraction)
    valid = [ids for ids, is_chosen in zip(documents, chosen, strict=True) if is_chosen]
    train = [ids for ids, is_chosen in zip(documents, chosen, strict=True) if not is_chosen]
    del documents  # lets _pack free them one by one
    if data.valid_paths and needs_validation:
        valid, _ = tokenize(read_documents(valid_files, data.text_key), tokenizer)
    splits = Splits(train=_pack(train, seq_length, f"training data ({', '.join(data.paths)})"),
                    valid=_pack_valid(valid, seq_length, data) if needs_validation else None)
    for samples in (splits.train, splits.valid):
        _check_vocabulary(samples, vocab_size, tokenizer)
    return splits


def tokenize(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[NDArray[np.int32]], list[float]]:
    """Per document its token ids, end of text included, and its `document_hash`."""
    end = end_of_text_id(tokenizer)
    documents, hashes = [], []
    for batch in _batched(texts):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        documents += [np.array([*ids, end], dtype=np.int32) for ids in encoded["input_ids"]]
        hashes += [document_hash(text) for text in batch]
    return documents, hashes


def document_hash(text: str) -> float:
    """A number in [0, 1] that depends on the text alone: the same on every machine, whatever the file is called."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def held_out(hashes: list[float], valid_fraction: float) -> list[bool]:
    """Which documents are held out: those whose hash lies below `valid_fraction`.

    Of two different documents or more, at least one is held out and one trained on, so that a handful of files works too; of one
    alone, none is held out.
    """
    if valid_fraction == 0 or len(set(hashes)) < 2:
        return [False] * len(hashes)
    bound = min(max(valid_fraction, np.nextafter(min(hashes), 2)), max(hashes))
    return [place < bound for place in hashes]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _check_settings(data: DataSection, seq_length: int, max_positions: int, needs_validation: bool) -> None:
    if not 1 <= seq_length <= max_positions:
        raise InputError(f"tuning.seq_length must lie in 1..{max_positions} (the model's max_position_embeddings), got {seq_length}")
    if not 0 <= data.valid_fraction < 1:
        raise InputError(f"data.valid_fraction must be at least 0 and below 1, got {data.valid_fraction}")
    if needs_validation and not data.valid_paths and data.valid_fraction == 0:
        raise InputError("validation needs held-out data, got data.valid_fraction = 0 and no data.valid_paths; "
                         "set one of them, or tuning.eval_iters to 0")


def _pack(documents: list[NDArray[np.int32]], seq_length: int, name: str, remedy: str = "") -> PackedSamples:
    """One stream of `documents`, which are taken from the list as they are copied: two copies of big data would not fit."""
    stream = np.empty(sum(map(len, documents)), dtype=np.int32)
    if len(stream) <= seq_length:
        raise InputError(f"a sample takes tuning.seq_length + 1 = {seq_length + 1} tokens, but the {name} holds only {len(stream)}; "
                         f"give more text, {remedy}or a shorter tuning.seq_length")
    stop = len(stream)
    while documents:
        ids = documents.pop()
        stream[stop - len(ids): stop] = ids
        stop -= len(ids)
    return PackedSamples(stream, seq_length)


def _pack_valid(documents: list[NDArray[np.int32]], seq_length: int, data: DataSection) -> PackedSamples:
    if data.valid_paths:
        return _pack(documents, seq_length, f"validation data ({', '.join(data.valid_paths)})")
    tried = ", ".join(data.paths)
    if not documents:
        raise InputError(f"data.paths = {tried} holds a single document, so none can be held out; give data.valid_paths or more documents, "
                         "or set tuning.eval_iters to 0")
    return _pack(documents, seq_length, f"validation data ({data.valid_fraction:g} of the documents of {tried})",
                 "a larger data.valid_fraction, data.valid_paths, ")


def _check_vocabulary(samples: PackedSamples | None, vocab_size: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    largest = int(samples.stream.max()) if samples is not None else 0
    if largest >= vocab_size:
        raise InputError(f"token ids must lie below the model's vocabulary of {vocab_size}, but the tokenizer in {tokenizer.name_or_path} "
                         f"gave {largest}; set data.tokenizer to the one that the model was trained with")
