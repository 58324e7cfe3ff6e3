"""Mixtures of requests, by the thousand: every request must say what it says alone."""
from dataclasses import dataclass, field
from pathlib import Path

from mixtures import Subject, mixture


@dataclass
class Mixtures:
    """What came of it."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown."""
        return f"{self.requests} requests, by policies, lengths, penalties and memory drawn at random, equal to a plain decoder's."


def stress_mixtures(count: int, seed: int, folder: Path) -> Mixtures:
    """`count` mixtures with their own seeds."""
    subject, outcome = Subject(folder), Mixtures()
    for index in range(count):
        try:
            outcome.requests += mixture(subject, seed * 1_000_000 + index)
        except Exception as error:  # whatever it is, the others are tried too
            outcome.failures.append(f"mixture {index}: {type(error).__name__}: {error}")
    return outcome
