"""Prompt lookup finds what followed the newest tokens earlier, and drafts as many as pay."""

import random

import pytest

from ee_tuning.engine.prompt_lookup import LONG, MOST_LENGTH, SHORT, MatchRecord, PromptLookup


def occurrences(tokens: list[int], size: int) -> list[int]:
    """Positions behind earlier occurrences of the last `size` tokens."""
    return [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]


@pytest.mark.parametrize("vocabulary", [2, 4, 12])
def test_a_match_is_one(vocabulary):
    """A match that is none, one that is longer than it says, a long one that is overlooked for a short one."""
    draw, tokens, lookup, found = random.Random(vocabulary), [], PromptLookup(), 0
    for _ in range(600):
        tokens.append(draw.randrange(vocabulary))
        lookup.read(tokens, len(tokens), 0, MatchRecord())
        short, long = (occurrences(tokens, size) for size in (SHORT, LONG))
        assert (lookup.length > 0) == bool(short)
        if long:
            assert lookup.length >= LONG
        if lookup.length:
            found += 1
            ends = occurrences(tokens, lookup.length)
            assert lookup.drafts(tokens, 1)[0] in {tokens[end] for end in ends}
    assert found > 50


def test_drafts_run_over_into_themselves():
    """A text that goes in circles of three, of which no more than three tokens are known."""
    tokens, lookup = [9, *[1, 2, 3] * 3], PromptLookup()
    lookup.read(tokens, len(tokens), 0, MatchRecord())
    assert lookup.drafts(tokens, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_tokens_are_read_once_and_prompts_teach_nothing():
    """A token that is counted twice; a prompt's own repetitions taken for those of answers."""
    tokens, lookup, record = [1, 2, 3] * 10, PromptLookup(), MatchRecord()
    lookup.read(tokens, len(tokens), len(tokens), record)
    assert record == MatchRecord()
    tokens += [1, 2, 5]
    for _ in range(2):
        lookup.read(tokens, len(tokens), 30, record)
    changed = [n for n in range(MOST_LENGTH + 1) if record.seen[n] != MatchRecord().seen[n]]
    assert changed == [27, 28, 29]
    assert record.acceptance_probability(27) > MatchRecord().acceptance_probability(27)
    assert record.acceptance_probability(29) < MatchRecord().acceptance_probability(29)


def test_as_many_are_drafted_as_pay():
    """Drafts that cost more than they bring; a good match that is cut short."""
    record = MatchRecord()
    for _ in range(400):
        record.add(MOST_LENGTH, True)
        record.add(5, False)

    def seconds(count: int) -> float:
        return 1 + 0.2 * count

    assert record.best_count(MOST_LENGTH, 12, seconds, 1.0) == 12
    assert record.best_count(5, 12, seconds, 1.0) == 0
    assert record.best_count(MOST_LENGTH, 12, seconds, 4.0) == 0, "exits bring more"
    rates = {n: sum(_share(record, 9, k) for k in range(n + 1)) / seconds(n) for n in range(13)}
    best = max(rates, key=lambda n: rates[n])
    assert record.best_count(9, 12, seconds, 1.0) == (best if rates[best] > 1.05 else 0)


def _share(record: MatchRecord, length: int, count: int) -> float:
    share = 1.0
    for k in range(count):
        share *= record.acceptance_probability(length + k)
    return share
