"""What became of a damaged file: the possible outcomes, and the judge who finds out which it was."""

import enum
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.errors import InputError

MAX_SECONDS, MAX_BYTES = 20, 1 << 30
"""What reading one damaged folder of a few hundred KB may take."""


class Outcome(enum.StrEnum):
    """What became of a mutation. The last one must never be."""

    REFUSED = "refused in one line that names the file"
    UNHARMED = "loads, every tensor byte for byte as it was"
    FINGERPRINTED = "loads as another model, whose exits refuse it by its fingerprint"
    UNKNOWABLE = "loads as another model, which nothing in the format can tell"
    WRONG = "loads wrong, or ends in a traceback, a hang or too much memory"


@dataclass(frozen=True)
class Content:
    """What was read."""

    tensors: Mapping[str, Tensor]
    identity: Any
    """A model's fingerprint; what an artifact says of itself."""


Mutation = Callable[[random.Random, Path], Path]
"""Damages a folder; returns what has to be named. `unknowable` marks those that a format without checksums can not
tell.
"""


@dataclass
class Tally:
    """Outcomes by target and kind of mutation, and what went wrong."""

    counts: Counter[tuple[str, str, Outcome]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, target: str, kind: str, outcome: Outcome, story: str = "") -> None:
        """One more."""
        self.counts[target, kind, outcome] += 1
        if outcome is Outcome.WRONG:
            self.failures.append(f"{target}, {kind}: {story}")

    def table(self) -> str:
        """Markdown: a row per target and kind, a column per outcome."""
        rows = sorted({(target, kind) for target, kind, _ in self.counts})
        lines = ["| of | mutation | " + " | ".join(Outcome) + " |", "|---|---|" + "---|" * len(Outcome)]
        for target, kind in rows:
            lines.append(
                f"| {target} | {kind} | "
                + " | ".join(str(self.counts[target, kind, outcome]) for outcome in Outcome)
                + " |"
            )
        sums = [sum(count for (_, _, each), count in self.counts.items() if each is outcome) for outcome in Outcome]
        return "\n".join([*lines, "| all | | " + " | ".join(map(str, sums)) + " |"])


class Hangs(BaseException):
    """Not an Exception, or a reader that turns every error of a hostile file into its own would swallow it."""


@contextmanager
def limits() -> Iterator[None]:
    """Ends the block by an error when it takes longer, or more memory, than reading a small folder may."""

    def ring(*_: Any) -> None:
        raise Hangs(f"still reading after {MAX_SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def judge(
    read: Callable[[Path], Content], folder: Path, damaged: Path, wanted: Content, *, is_unknowable: bool
) -> tuple[Outcome, str]:
    """The outcome of reading `folder`, in which `damaged` is no longer as it was, and a word on it."""
    try:
        with limits():
            got = read(folder)
    except InputError as error:
        message = str(error)
        if "\n" in message or len(message) > 1000:
            return Outcome.WRONG, f"not one line: {message!r}"
        is_named = str(folder) in message and damaged.name in message
        return (Outcome.REFUSED, "") if is_named else (Outcome.WRONG, f"{damaged.name} is not named: {message}")
    except (Exception, Hangs):
        return Outcome.WRONG, traceback.format_exc()
    is_same = got.tensors.keys() == wanted.tensors.keys() and all(
        same_bytes(tensor, wanted.tensors[name]) for name, tensor in got.tensors.items()
    )
    if is_same and got.identity == wanted.identity:
        return Outcome.UNHARMED, ""
    if is_unknowable:
        return (Outcome.UNKNOWABLE if got.identity == wanted.identity else Outcome.FINGERPRINTED), ""
    return Outcome.WRONG, "it loads, and is not what was written"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether shape, type and every bit agree, those of NaN too."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


def torture(
    target: str,
    source: Path,
    read: Callable[[Path], Content],
    mutations: Mapping[str, Mutation],
    unknowable: set[str],
    count: int,
    seed: int,
    scratch: Path,
    tally: Tally,
    seal: Callable[[Path], None] | None = None,
) -> None:
    """Damages `count` copies of `source`, one way after the other (then `seal`s them), reads each and tallies what came
    of it.
    """
    wanted = read(source)
    kinds = list(mutations)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        draw = random.Random(f"{seed} {target} {index}")
        folder = scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        damaged = mutations[kind](draw, folder)
        if seal is not None:
            seal(folder)
        outcome, story = judge(read, folder, damaged, wanted, is_unknowable=kind in unknowable)
        tally.add(target, kind, outcome, f"number {index} of seed {seed}: {story}")
