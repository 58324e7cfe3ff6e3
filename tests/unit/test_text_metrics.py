"""Completions against answers: what counts as the same, and what rouge-l is."""

import random
import sys

import pytest

from ee_tuning.errors import InputError
from ee_tuning.evaluation.text_metrics import contains, exact, normalized, rouge_l


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Capital, of\nFRANCE!", "capital of france"),
        ("1,000 km", "1000 km"),
        ("3.5.", "3.5"),
        ("“São Paulo”", "são paulo"),
        ("Paris—an answer", "paris answer"),
        ("The", "the"),
        ("?!", "?!"),
        ("theatre", "theatre"),
        ("  ", ""),
    ],
)
def test_case_punctuation_and_articles_do_not_count(text: str, wanted: str):
    """An answer that is right is counted wrong for its full stop; 3.5 becomes 35; an answer without letters is in every
    text.
    """
    assert normalized(text) == wanted


@pytest.mark.parametrize(
    ("text", "answers", "is_exact", "is_contained"),
    [
        ("Paris.", ["paris"], True, True),
        ("It is Paris, the capital", ["Lyon", "Paris"], False, True),
        ("Parisian", ["Paris"], False, False),
        ("Comparis Paris", ["Paris"], False, True),
        ("It is 1000", ["100"], False, False),
        ("法国的首都是巴黎。", ["巴黎"], False, True),
        ("anything", ["?"], False, False),
        ("Really?", ["?"], False, False),
        ("The", ["the"], True, True),
        ("", ["Paris"], False, False),
        ("The United States", ["united states"], True, True),
        ("Saint-Denis", ["Saint-Denis"], True, True),
    ],
)
def test_exact_and_contained(text: str, answers: list[str], is_exact: bool, is_contained: bool):
    """An answer found within a longer word or number; one of several answers that is not looked at."""
    assert (exact(text, answers), contains(text, answers)) == (is_exact, is_contained)


def test_rouge_l_is_f1_of_the_longest_common_subsequence():
    """Recall in place of F1, the mean over answers in place of the best, stems. Against a plain implementation."""
    pytest.importorskip("rouge_score")
    random.seed(0)
    for _ in range(20):
        said, *answers = [
            random.choices(["one", "two", "three", "four", "five"], k=random.randint(1, 8)) for _ in range(3)
        ]
        wanted = max(2 * common(said, each) / (len(said) + len(each)) for each in answers)
        assert rouge_l()(" ".join(said), [" ".join(each) for each in answers]) == pytest.approx(wanted)


def test_without_its_package_rouge_l_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    """A traceback, or the name of a package that is not the user's to know."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"pip install 'ee_tuning\[eval\]'"):
        rouge_l()


def common(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + common(first[1:], second[1:])
    return max(common(first[1:], second), common(first, second[1:]))
