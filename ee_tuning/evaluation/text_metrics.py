"""Metrics of a completion against right answers: each gives a prompt a score in 0..1, the best over its answers.

Texts are compared as in SQuAD 1.1 (Rajpurkar et al., arXiv 1606.05250): in lower case, without punctuation, without the
articles a, an and the, with whitespace as single blanks. Unlike there, punctuation is Unicode's, long dashes separate
words, and a point or comma between digits is read as in numbers: 3.5 stays, 1,000 is 1000.
"""

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ee_tuning.errors import InputError

TextMetric = Literal["exact", "contains", "rouge-l"]
Score = Callable[[str, Sequence[str]], float]
"""Completion, answers -> score."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_THOUSANDS, _POINT = re.compile(r"(?<=\d),(?=\d)"), re.compile(r"(?<=\d)\.(?=\d)")
_KEPT_POINT = "\uf8ff"
_UNPARTED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def normalized(text: str) -> str:
    """Normalizes `text`. A text that would become empty ("?", "The") is only put into lower case."""
    lower = unicodedata.normalize("NFC", text).lower()
    words = _POINT.sub(_KEPT_POINT, _THOUSANDS.sub("", lower))
    words = _without_punctuation(words).replace(_KEPT_POINT, ".")
    return " ".join(_ARTICLES.sub(" ", words).split()) or " ".join(lower.split())


def exact(text: str, answers: Sequence[str]) -> float:
    """1 where the completion equals an answer, both normalized."""
    return float(normalized(text) in map(normalized, answers))


def contains(text: str, answers: Sequence[str]) -> float:
    """1 where the completion contains an answer as whole words, both normalized; in Chinese, Japanese, Thai …
    anywhere.
    """
    said = normalized(text)
    return float(any(_stands_in(normalized(answer), said) for answer in answers))


def rouge_l() -> Score:
    """F1 of the longest common subsequence of words (Lin 2004), by the package rouge-score, without stemming.

    Raises InputError where it is missing.
    """
    try:
        scorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    except ImportError as error:
        raise InputError(
            f"the metric rouge-l needs the package rouge-score ({error}); pip install 'ee_tuning[eval]'"
        ) from error
    return lambda text, answers: max(float(scorer.score(answer, text)["rougeL"].fmeasure) for answer in answers)


def score_of(metric: TextMetric) -> Score:
    """Returns the metric's function. Raises InputError where a package that it needs is missing."""
    return rouge_l() if metric == "rouge-l" else exact if metric == "exact" else contains


def _without_punctuation(text: str) -> str:
    """Returns `text` without punctuation. Long dashes separate words, as in print."""
    kinds = ((character, unicodedata.category(character)) for character in text)
    return "".join(
        " " if kind == "Pd" and character != "-" else "" if kind[0] in "PS" else character for character, kind in kinds
    )


def _stands_in(answer: str, text: str) -> bool:
    at = text.find(answer)
    while at >= 0:
        end = at + len(answer)
        if not _joins(text[at - 1 : at], answer[0]) and not _joins(answer[-1], text[end : end + 1]):
            return True
        at = text.find(answer, at + 1)
    return False


def _joins(left: str, right: str) -> bool:
    """Whether two neighbours belong to one word."""
    return _is_of_word(left) and _is_of_word(right)


def _is_of_word(character: str) -> bool:
    return character.isalnum() and not _UNPARTED.match(character)
