"""Mixtures of requests, by the thousand: every request must say what it says alone."""
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mixtures import Subject, mixture


@dataclass
class Mixtures:
    """What came of it."""

    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown."""
        seen = self.seen
        return (f"{seen['requests']} requests, by policies, lengths, penalties, memory and common beginnings drawn at random, equal to a "
                f"plain decoder's in {seen['steps']} steps; {seen['aborted']} were aborted, {seen['put back']} lost their memory and came "
                f"back, and {seen['reused']} tokens of prompts were not computed, for another had computed them.")


def stress_mixtures(count: int, seed: int, folder: Path) -> Mixtures:
    """`count` mixtures with their own seeds."""
    subject, outcome = Subject(folder), Mixtures()
    for index in range(count):
        try:
            outcome.seen += mixture(subject, seed * 1_000_000 + index)
        except Exception as error:  # whatever it is, the others are tried too
            outcome.failures.append(f"mixture {index}: {type(error).__name__}: {error}")
    return outcome
