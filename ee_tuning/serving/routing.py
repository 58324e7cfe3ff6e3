"""Chooses the replica of a request: the least loaded one, or one that has computed the prompt's beginning.

Work is counted in tokens to generate; a prompt token counts as an eighth of one.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple

from ee_tuning.generation.job import CHARACTERS_OF_TOKEN, READ_FOR_ONE_MADE

_BLOCK = 128
"""Characters that are compared as one block."""
_MOST_BLOCKS = 64
_REMEMBERED = 1 << 16
"""Number of remembered beginnings, the most recently used ones."""
_SLACK = 64
"""Difference of loads, beyond the cost of computing a beginning, up to which a replica with that beginning is
preferred.
"""
_DEFAULT_TOKENS = {"completion": 16, "chat": 256}
"""Assumed tokens of an answer without a limit. A chat's may be as long as the context, and seldom is."""


class Asked(NamedTuple):
    """The work of a request, estimated from its body."""

    prompt: str
    """The first prompt, or the messages, as one text."""
    read: float
    """Work of reading the prompts."""
    made: float
    """Most work of generating the answers."""


def asked_of(body: Any) -> Asked:
    """Estimates the work of a body, which may be any JSON. Its replica refuses invalid ones."""
    if not isinstance(body, dict):
        return Asked("", 0, 0)
    messages = body.get("messages")
    if isinstance(messages, list):
        prompts, kind = ["".join(map(_message_text, messages))], "chat"
    else:
        prompts, kind = _prompts(body.get("prompt")), "completion"
    most = [_count(body.get(name)) for name in ("max_completion_tokens", "max_tokens")]
    tokens = next((each for each in most if each is not None), _DEFAULT_TOKENS[kind])
    characters = sum(map(len, prompts))
    made = tokens * (_count(body.get("n")) or 1) * len(prompts)
    return Asked(prompts[0] if prompts else "", characters / CHARACTERS_OF_TOKEN / READ_FOR_ONE_MADE, made)


def _message_text(message: Any) -> str:
    if not isinstance(message, dict):
        return ""
    return f"{message.get('role')}\n{message.get('content')}\n"


def _prompts(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        return []
    if prompt and isinstance(prompt[0], int):
        return [_ids_text(prompt)]
    return [each if isinstance(each, str) else _ids_text(each) for each in prompt if isinstance(each, str | list)]


def _ids_text(ids: list[Any]) -> str:
    """Writes token ids with about as many characters as their text has."""
    return "".join(f"{token:>{CHARACTERS_OF_TOKEN}}" if isinstance(token, int) else "?" for token in ids)


def _count(value: Any) -> int | None:
    return min(value, 1 << 20) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class Router:
    """Loads of replicas, and the prompts that each has computed lately."""

    def __init__(self, num_replicas: int):
        self.loads = [0.0] * num_replicas
        """Unfinished work of each replica."""
        self._known: OrderedDict[int, set[int]] = OrderedDict()
        """Hash of a beginning -> replicas that have computed it."""
        self._turn = [0] * num_replicas
        self._num_chosen = 0

    def choose(self, prompt: str, alive: Collection[int]) -> int:
        """Chooses one of the replicas `alive` for a prompt, and remembers that it computes the prompt."""
        hashes = _hashes(prompt)
        chosen = min(alive, key=lambda replica: (self.loads[replica], self._turn[replica]))
        for count in range(len(hashes), 0, -1):
            readers = self._known.get(hashes[count - 1], set()).intersection(alive)
            if readers:
                reader = min(readers, key=lambda replica: (self.loads[replica], self._turn[replica]))
                saved = count * _BLOCK / CHARACTERS_OF_TOKEN / READ_FOR_ONE_MADE
                if self.loads[reader] - self.loads[chosen] <= saved + _SLACK:
                    chosen = reader
                break
        for each in hashes:
            self._known.setdefault(each, set()).add(chosen)
            self._known.move_to_end(each)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        self._num_chosen += 1
        self._turn[chosen] = self._num_chosen
        return chosen


def _hashes(prompt: str) -> list[int]:
    """Returns a hash for each beginning of whole blocks."""
    hashes, last = [], 0
    for start in range(0, min(len(prompt) - _BLOCK + 1, _MOST_BLOCKS * _BLOCK), _BLOCK):
        last = hash((last, prompt[start : start + _BLOCK]))
        hashes.append(last)
    return hashes
