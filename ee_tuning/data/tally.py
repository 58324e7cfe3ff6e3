"""Counts of documents, left-out records and skipped files, and the lines that report them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ee_tuning.data.piped import as_given
from ee_tuning.data.records import LeftOut
from ee_tuning.data.tokens import Samples
from ee_tuning.notices import say

_MAX_FILES = 20
_MAX_NAMES = 8


@dataclass(kw_only=True)
class LeftOutCount:
    """Left-out records by reason."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> count, and the place of the first."""

    def add(self, record: LeftOut) -> None:
        """Counts one record."""
        count, first = self.reasons.get(record.reason) or (0, record.where())
        self.reasons[record.reason] = count + 1, first

    def join(self, other: Mapping[str, Sequence[Any]]) -> None:
        """Adds the counts of a later range."""
        for reason, (count, first) in other.items():
            before, earlier = self.reasons.get(reason, (0, first))
            self.reasons[reason] = before + count, earlier

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} × {reason} (the first at {first})" for reason, (count, first) in self.reasons.items()
        )


@dataclass(kw_only=True)
class FileCount:
    """The counts of one file."""

    name: str
    documents: int = 0
    tokens: int = 0
    left_out: LeftOutCount = field(default_factory=LeftOutCount)

    def as_tree(self) -> list[Any]:
        """Returns the counts as plain data, for JSON."""
        return [self.name, self.documents, self.tokens, self.left_out.reasons]

    @classmethod
    def of_tree(cls, tree: list[Any]) -> "FileCount":
        """The inverse of `as_tree`."""
        name, documents, tokens, reasons = tree
        count = cls(name=name, documents=documents, tokens=tokens)
        count.left_out.join(reasons)
        return count


def left_out_of(counts: Iterable[FileCount]) -> LeftOutCount:
    """Merges the counts of all files."""
    total = LeftOutCount()
    for count in counts:
        total.join(count.left_out.reasons)
    return total


def nothing_to_learn(key: str, names: str, counts: Sequence[FileCount]) -> str:
    """Returns the message for data without any document."""
    if (left_out := left_out_of(counts)).reasons:
        return f"{key} = {names} holds nothing to learn from: {left_out}; mend these, or give other files"
    return f"{key} = {names} holds no text; give files that are not empty"


def print_counts(counts: Sequence[FileCount]) -> None:
    """Prints a line per file, for the first files, and one for left-out records, to stderr."""
    for count in counts[:_MAX_FILES]:
        _print_line(f"{count.name}: {count.documents:,} documents, {count.tokens:,} tokens")
    if more := counts[_MAX_FILES:]:
        _print_line(
            f"{len(more):,} more files: {sum(each.documents for each in more):,} documents, {sum(each.tokens for each in more):,} tokens"
        )
    if (left_out := left_out_of(counts)).reasons:
        _print_line(f"left out, because it has nothing to learn: {left_out}")


def print_passed_over(names: Sequence[str]) -> None:
    """Prints a line about skipped files of folders, if any, to stderr."""
    if names:
        _print_line(f"passed over: {listed(names)}")


def print_skipped(what: str, samples: Samples | None) -> None:
    """Prints a line about skipped parts of the stream, if any, to stderr."""
    if samples is not None and (num_skipped := samples.num_windows - len(samples)):
        _print_line(
            f"{num_skipped:,} of {samples.num_windows:,} {what} samples are skipped: none of their tokens is to be learned, as within "
            "prompts longer than tuning.seq_length"
        )


def listed(names: Sequence[str]) -> str:
    """Returns some of the names, and the number of the others."""
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _print_line(line: str) -> None:
    say(f"data: {as_given(line)}")
