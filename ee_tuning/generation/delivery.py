"""Delivery of records as they are made: to a stream, in the prompts' order, or into a file (output_file.py)."""

import sys
from contextlib import suppress
from typing import Protocol, TextIO

from ee_tuning.errors import InputError
from ee_tuning.generation.output_file import Key
from ee_tuning.generation.record import Record
from ee_tuning.json_file import to_json
from ee_tuning.progress import ProgressLines


class Delivery(Protocol):
    """Takes records in any order."""

    @property
    def done(self) -> frozenset[Key]:
        """Completions that an earlier process delivered."""

    def write(self, record: Record) -> None:
        """Delivers a completion. Raises InputError or OSError where it can not be written."""

    def fail(self, record: Record) -> None:
        """Delivers the record of a prompt that can not be completed."""

    def finish(self) -> None:
        """Completes the output. Called after the last record."""

    def close(self) -> None:
        """Closes the output, complete or not."""


class InOrder:
    """Writes each record as soon as all records before it are written."""

    done: frozenset[Key] = frozenset()

    def __init__(self, stream: TextIO, counts: list[int]):
        """`counts` are the completions of each prompt."""
        self._stream, self._left = stream, list(counts)
        self._held: list[dict[int, Record]] = [{} for _ in counts]
        self._first = 0
        """The first prompt that lacks a completion."""

    def write(self, record: Record) -> None:
        """Writes a completion, or keeps it until its turn."""
        place = record["prompt_index"]
        self._held[place][record.get("index", 0)] = record
        self._left[place] -= 1
        while self._first < len(self._left) and self._left[self._first] <= 0:
            self._print(self._first)
            self._first += 1

    def fail(self, record: Record) -> None:
        """Delivers the record of a prompt that can not be completed."""
        self._left[record["prompt_index"]] = 1
        self.write(record)

    def finish(self) -> None:
        """Does nothing: every record is written."""

    def close(self) -> None:
        """Writes the finished records that wait for an unfinished one."""
        with suppress(OSError, InputError):  # the stream refused data before, and reported it then
            for place in range(self._first, len(self._held)):
                self._print(place)
            if self._stream is not sys.stdout:
                self._stream.close()

    def _print(self, place: int) -> None:
        for _, record in sorted(self._held[place].items()):
            try:
                print(to_json(record, ensure_ascii=False), file=self._stream, flush=True)
            except OSError as error:
                if self._stream is sys.stdout:
                    raise
                raise InputError(
                    f"--output {self._stream.name} can not be written: {error.strerror}; give another --output"
                ) from error
        self._held[place].clear()


class CompletionProgress:
    """Progress of a long job on standard error."""

    def __init__(self, num_completions: int, num_done: int):
        self._num, self._done, self._tokens = num_completions, num_done, 0
        self._lines = ProgressLines(num_done)

    def tokens(self, count: int) -> None:
        """Counts tokens."""
        self._tokens += count

    def completion(self) -> None:
        """Counts a completion."""
        self._done += 1
        rate = self._tokens / max(self._lines.seconds, 1e-9)
        self._lines.show(f"{self._done:,} of {self._num:,} completions · {rate:,.1f} tokens/s", self._done, self._num)
