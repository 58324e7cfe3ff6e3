"""Tokenizes files into .bin and .idx: processes tokenize ranges in parallel, and the results are joined in order.

Everything happens in steps much shorter than a minute, so that waiting ranks can be kept alive in between.
"""

import json
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ee_tuning.data.documents import FileRange, file_ranges
from ee_tuning.data.encoding import Recipe, id_type, tokenize_range
from ee_tuning.data.indexed import BIN_SUFFIX, INDEX_SUFFIX, MASK_SUFFIX, with_suffix, write_index
from ee_tuning.data.tally import FileCount
from ee_tuning.errors import InputError
from ee_tuning.interrupts import end_at_once
from ee_tuning.json_file import to_json
from ee_tuning.progress import ByteProgress

BYTES_PER_WORKER = 4_000_000
"""Fewer bytes are not worth the seconds that a process takes to start."""
_SECONDS_PER_STEP = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenizedRange:
    """One written output."""

    num_documents: int
    num_tokens: int
    largest: int
    """The largest token id."""


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """All outputs, and the counts of each file."""

    outputs: list[TokenizedRange]
    files: list[FileCount]


def check_workers(wanted: int) -> None:
    """Raises InputError where data.workers is negative."""
    if wanted < 0:
        raise InputError(f"data.workers must be at least 0, got {wanted}; 0 takes one per CPU core")


def num_workers(ranges: Sequence[FileRange], wanted: int) -> int:
    """Returns how many processes to start; 0 means that this process does the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted or cores, len(ranges), sum(piece.num_bytes for piece in ranges) // BYTES_PER_WORKER)


def tokenize_files(
    files: Sequence[Path],
    recipe: Recipe,
    folder: Path,
    outputs: Sequence[Path],
    valid_fraction: float,
    workers: int,
    progress: ByteProgress,
) -> Generator[None, None, Tokenized]:
    """Writes the documents of `files` to the prefix outputs[0], and those that `held_out` chooses to outputs[1].

    `folder` holds intermediate files. Yields between steps and returns what was written. Raises InputError where a file
    or a document can not be used.
    """
    ranges = file_ranges(files)
    parts = [folder / f"piece-{number:06d}.npz" for number in range(len(ranges))]
    progress.expect(sum(piece.num_bytes for piece in ranges))
    processes = num_workers(ranges, workers)
    for piece in _side_by_side(ranges, parts, recipe, processes) if processes else _in_turn(ranges, parts, recipe):
        progress.advance(piece.num_bytes if piece else 0)
        yield
    hashes = [_load(part)["hashes"] for part in parts]
    counts = _counted(files, ranges, parts)
    chosen = held_out(np.concatenate([np.empty(0), *hashes]), valid_fraction)
    dtype = np.dtype(id_type(recipe))
    has_mask = any("counts" in _load(part) for part in parts)
    joints = [ShardWriter(output, dtype, has_mask) for output in outputs]
    first = 0
    for part, own in zip(parts, hashes, strict=True):
        here = chosen[first : first + len(own)]
        first += len(own)
        for joint, documents in zip(joints, (~here, here), strict=False):
            joint.append(_load(part), documents)
        part.unlink()
        yield
    return Tokenized(outputs=[joint.close() for joint in joints], files=counts)


def _counted(files: Sequence[Path], ranges: Sequence[FileRange], parts: Sequence[Path]) -> list[FileCount]:
    counts = {path: FileCount(name=str(path)) for path in files}
    for piece, part in zip(ranges, parts, strict=True):
        count, loaded = counts[piece.path], _load(part)
        count.documents += len(loaded["lengths"])
        count.tokens += int(loaded["lengths"].sum())
        count.left_out.join(json.loads(str(loaded["left_out"])))
    return list(counts.values())


def held_out(hashes: NDArray[np.float64], valid_fraction: float) -> NDArray[np.bool_]:
    """Chooses the documents to hold out: those whose hash is below `valid_fraction`.

    Of at least two different documents, at least one is held out and one is trained on, so that a handful of files
    works; a single one is not held out.
    """
    if valid_fraction == 0 or len(hashes) == 0 or hashes.min() == hashes.max():
        return np.zeros(len(hashes), dtype=bool)
    return hashes < min(max(valid_fraction, np.nextafter(hashes.min(), 2)), hashes.max())


def _write_part(piece: FileRange, part: Path, recipe: Recipe) -> None:
    tokens = tokenize_range(piece, recipe)
    arrays: dict[str, Any] = {
        "ids": tokens.ids,
        "lengths": tokens.lengths,
        "hashes": tokens.hashes,
        "counts": tokens.counts,
        "left_out": np.array(to_json(tokens.left_out.reasons)),
    }
    np.savez(part, **{name: array for name, array in arrays.items() if array is not None})


def _load(part: Path) -> np.lib.npyio.NpzFile:
    return np.load(part)  # its arrays are read on access


def _in_turn(ranges: Sequence[FileRange], parts: Sequence[Path], recipe: Recipe) -> Iterator[FileRange | None]:
    for piece, part in zip(ranges, parts, strict=True):
        _write_part(piece, part, recipe)
        yield piece


def _side_by_side(
    ranges: Sequence[FileRange], parts: Sequence[Path], recipe: Recipe, processes: int
) -> Iterator[FileRange | None]:
    # Spawned, not forked: this process may have threads of gloo or CUDA.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_at_once) as pool:
        try:
            waiting = iter(zip(ranges, parts, strict=True))
            running: dict[Future[None], FileRange] = {}
            while True:
                while len(running) < 2 * processes and (job := next(waiting, None)):
                    running[pool.submit(_write_part, *job, recipe)] = job[0]
                if not running:
                    return
                done, _ = wait(running, timeout=_SECONDS_PER_STEP, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield running.pop(future)
                if not done:
                    yield None
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {processes} processes that tokenize was ended from outside, as by a machine out of memory; set "
                "data.workers lower, or give shorter files"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class ShardWriter:
    """Writes one output, part by part."""

    def __init__(self, prefix: Path, dtype: np.dtype, has_mask: bool) -> None:
        self._prefix, self._dtype = prefix, dtype
        self._data = with_suffix(prefix, BIN_SUFFIX).open("wb")
        self._mask = with_suffix(prefix, MASK_SUFFIX).open("wb") if has_mask else None
        self._lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._largest = 0

    def append(self, part: np.lib.npyio.NpzFile, documents: NDArray[np.bool_]) -> None:
        """Appends the chosen documents of a part."""
        lengths = part["lengths"]
        tokens = np.repeat(documents, lengths)
        ids = part["ids"][tokens]
        self._lengths.append(lengths[documents])
        self._largest = max(self._largest, int(ids.max(initial=0)))
        ids.astype(self._dtype).tofile(self._data)
        if self._mask:
            (part["counts"][tokens] if "counts" in part else np.ones(len(ids), np.uint8)).tofile(self._mask)

    def close(self) -> TokenizedRange:
        """Closes the output. Call it last."""
        for file in (self._data, self._mask):
            if file:
                file.close()
        lengths = np.concatenate(self._lengths)
        write_index(with_suffix(self._prefix, INDEX_SUFFIX), self._dtype, lengths)
        return TokenizedRange(num_documents=len(lengths), num_tokens=int(lengths.sum()), largest=self._largest)
