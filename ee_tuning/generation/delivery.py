"""Where records of completions go while more are made: to a stream, in the prompts' order, or into a file
(output_file.py).
"""

import sys
import time
from contextlib import suppress
from typing import Protocol, TextIO

from ee_tuning.errors import InputError
from ee_tuning.generation.output_file import Key
from ee_tuning.generation.record import Record
from ee_tuning.json_file import to_json

_SECONDS_BETWEEN_LINES = 10.0


class Delivery(Protocol):
    """Takes records in any order."""

    @property
    def done(self) -> frozenset[Key]:
        """Completions that an earlier process delivered."""

    def write(self, record: Record) -> None:
        """Takes a completion. Raises InputError or OSError where it can not be written."""

    def fail(self, record: Record) -> None:
        """Takes the one record of a prompt that can not be done."""

    def finish(self) -> None:
        """All are there."""

    def close(self) -> None:
        """Ends it, all being there or not."""


class InOrder:
    """Writes each record as soon as all before it are there."""

    done: frozenset[Key] = frozenset()

    def __init__(self, stream: TextIO, counts: list[int]):
        """`counts` are the completions of each prompt."""
        self._stream, self._left = stream, list(counts)
        self._held: list[dict[int, Record]] = [{} for _ in counts]
        self._first = 0
        """The first prompt that lacks one."""

    def write(self, record: Record) -> None:
        """Takes a completion."""
        place = record["prompt_index"]
        self._held[place][record.get("index", 0)] = record
        self._left[place] -= 1
        while self._first < len(self._left) and self._left[self._first] <= 0:
            self._print(self._first)
            self._first += 1

    def fail(self, record: Record) -> None:
        """Takes the one record of a prompt that can not be done."""
        self._left[record["prompt_index"]] = 1
        self.write(record)

    def finish(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Writes what is done behind a prompt that is not."""
        with suppress(OSError, InputError):  # of a stream that took no more, and said so before
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


class Progress:
    """Tells on stderr how far a long job is: a line now and then, none of a short one."""

    def __init__(self, num_completions: int, num_done: int):
        self._num, self._done_before, self._done, self._tokens = num_completions, num_done, num_done, 0
        self._began = self._spoke = time.monotonic()

    def tokens(self, count: int) -> None:
        """Counts tokens."""
        self._tokens += count

    def completion(self) -> None:
        """Counts one, and tells, the longer it lasts the less often."""
        self._done += 1
        now = time.monotonic()
        if now - self._spoke >= max(_SECONDS_BETWEEN_LINES, (now - self._began) / 50):
            self._spoke, seconds = now, now - self._began
            left = round(seconds * (self._num - self._done) / (self._done - self._done_before))
            print(
                f"{self._done:,} of {self._num:,} completions · {self._tokens / seconds:,.1f} tokens/s · "
                f"{left // 60}:{left % 60:02d} left",
                file=sys.stderr,
                flush=True,
            )
