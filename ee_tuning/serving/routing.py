"""Which replica gets a request: the one with the least left to do, or one that has computed the prompt's beginning.

Work is counted in tokens to make; a token of a prompt costs an eighth of one.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple

from ee_tuning.generation.job import CHARACTERS_OF_TOKEN, READ_FOR_ONE_MADE

_BLOCK = 128
"""Characters of a beginning that are compared as one."""
_MOST_BLOCKS = 64
_REMEMBERED = 1 << 16
"""Beginnings that are remembered, those used last."""
_SLACK = 64
"""Tokens by which the load may differ before a beginning counts for nothing beyond what its reading costs."""
_DEFAULT_TOKENS = {"completion": 16, "chat": 256}
"""Tokens of an answer whose request does not bound it; a chat's may be as long as the context, and seldom is."""


class Asked(NamedTuple):
    """What a request's body says of its work."""

    prompt: str
    """The first prompt, or the messages, as one text."""
    read: float
    """Work of reading the prompts."""
    made: float
    """Work of making the answers, at most."""


def asked_of(body: Any) -> Asked:
    """Reads a body, which may be anything that JSON can say: its replica refuses what is wrong with it."""
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
    """Token ids as about as many characters as their text has."""
    return "".join(f"{token:>{CHARACTERS_OF_TOKEN}}" if isinstance(token, int) else "?" for token in ids)


def _count(value: Any) -> int | None:
    return min(value, 1 << 20) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


class Router:
    """Loads of replicas, and what each has read lately."""

    def __init__(self, num_replicas: int):
        self.loads = [0.0] * num_replicas
        """Work that each replica has left."""
        self._known: OrderedDict[int, set[int]] = OrderedDict()
        """Hash of a beginning -> replicas that have read it."""
        self._turn = [0] * num_replicas
        self._num_chosen = 0

    def choose(self, prompt: str, alive: Collection[int]) -> int:
        """The replica for a prompt, one of those `alive`, which is remembered to have read it then."""
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
    """A hash for each beginning of whole blocks."""
    hashes, last = [], 0
    for start in range(0, min(len(prompt) - _BLOCK + 1, _MOST_BLOCKS * _BLOCK), _BLOCK):
        last = hash((last, prompt[start : start + _BLOCK]))
        hashes.append(last)
    return hashes
