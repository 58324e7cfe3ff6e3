"""An automatic choice of the shortlist's size."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoVocab:
    """`auto`: the size is chosen by cost and by share of a text (`data/frequent_tokens.py`)."""

    @classmethod
    def read(cls, text: str) -> "AutoVocab | None":
        """Parses `auto`. Returns None where `text` is another word."""
        return cls() if text == "auto" else None

    def __str__(self) -> str:
        return "auto"
