"""Drafts by prompt lookup: where the newest tokens occur earlier in the text, the tokens that followed there are
drafted.

It is transformers' `prompt_lookup_num_tokens` and vLLM's method `ngram`. Here the number of drafts follows from the
share of matches of that length that continued equally, which is counted for every token whether it was drafted or not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

SHORT, LONG = 3, 8
"""Tokens of the n-grams that are looked up."""
MOST_LENGTH = 32
"""Longer matches count as of this length."""
MOST_DRAFTS = 12
"""Most drafts of a round."""
PRIOR = 4.0
"""Weight, in tokens, of the prior that a match of n tokens continues with probability n / (n + 3)."""
MEMORY = 0.995
"""The weight of a count after the next one of the same length."""
LEAST_GAIN = 1.05
"""Smallest expected speed-up over no drafts."""


@dataclass
class MatchRecord:
    """Counts, by the length of a match, of tokens after it and of those equal to the earlier one."""

    seen: list[float] = field(default_factory=lambda: [PRIOR] * (MOST_LENGTH + 1))
    right: list[float] = field(default_factory=lambda: [PRIOR * n / (n + 3) for n in range(MOST_LENGTH + 1)])

    def add(self, length: int, was_right: bool) -> None:
        """Counts a token behind a match of `length` tokens."""
        place = min(length, MOST_LENGTH)
        self.seen[place] = MEMORY * self.seen[place] + 1
        self.right[place] = MEMORY * self.right[place] + was_right

    def acceptance_probability(self, length: int) -> float:
        """Returns the probability that the token behind a match of `length` tokens equals the one that followed
        earlier.
        """
        place = min(length, MOST_LENGTH)
        return self.right[place] / self.seen[place]

    def best_count(self, length: int, most: int, seconds: Callable[[int], float], rate: float) -> int:
        """Returns the number of drafts, at most `most`, behind a match of `length` tokens that gives the most tokens
        per second; 0 where none is faster than `rate`. `seconds` returns the time of a pass with a number of drafts.
        """
        best, best_rate, expected, share = 0, LEAST_GAIN * rate, 1.0, 1.0
        for count in range(1, most + 1):
            share *= self.acceptance_probability(length + count - 1)
            expected += share
            if expected > best_rate * seconds(count):
                best, best_rate = count, expected / seconds(count)
        return best


class PromptLookup:
    """The n-grams of one sequence, and the place that its newest tokens match."""

    def __init__(self) -> None:
        self.length = 0
        """Number of tokens that match; 0 where none do."""
        self._start = 0
        """The position of the token that followed them."""
        self._num_read = 0
        self._behind: tuple[dict[tuple[int, ...], int], ...] = ({}, {})
        """n-gram -> the position behind its newest occurrence, for SHORT and LONG."""

    def read(self, tokens: list[int], stop: int, num_prompt_tokens: int, record: MatchRecord) -> None:
        """Reads tokens up to position `stop`, and counts tokens behind a match, except those of the prompt, in
        `record`.
        """
        for position in range(self._num_read, stop):
            goes_on = self.length > 0 and tokens[self._start] == tokens[position]
            if self.length and position >= num_prompt_tokens:
                record.add(self.length, goes_on)
            self.length, self._start = (self.length + 1, self._start + 1) if goes_on else (0, 0)
            for size, behind in zip((SHORT, LONG), self._behind, strict=True):
                if position + 1 >= size:
                    gram = tuple(tokens[position + 1 - size : position + 1])
                    if self.length < size and gram in behind:
                        self.length, self._start = size, behind[gram]
                    behind[gram] = position + 1
        self._num_read = max(stop, self._num_read)

    def drafts(self, tokens: list[int], count: int) -> list[int]:
        """Returns the `count` tokens that followed the match. They may continue into themselves where the text
        repeats.
        """
        known = tokens[self._start : self._start + count]
        while len(known) < count:
            known.append(known[len(known) - (len(tokens) - self._start)])
        return known
