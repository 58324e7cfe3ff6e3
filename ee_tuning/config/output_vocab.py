"""How many tokens exits say, where that is left to what they cost and how much of a text they are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AutoVocab:
    """`auto`: by cost and share of a text, as `data/frequent_tokens.py` has it."""

    @classmethod
    def read(cls, text: str) -> "AutoVocab | None":
        """None where `text` is another word."""
        return cls() if text == "auto" else None

    def __str__(self) -> str:
        return "auto"
