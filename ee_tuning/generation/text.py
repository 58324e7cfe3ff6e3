"""Decodes token ids as they are generated: text is held back while a character is incomplete or may begin a stop
string.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

REPLACEMENT = "�"
CONTEXT_TOKENS = 4
"""Tokens of the prompt that are decoded together with the completion, because some tokenizers drop the space at the
beginning of a text.
"""
CHARACTER_TOKENS = 4
"""No character has more bytes, and so more tokens, than this."""


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns id -> text of each token that is left out of decoded text."""
    added = {token: str(each) for token, each in tokenizer.added_tokens_decoder.items() if each.special}
    return {**dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)), **added}


class TextStream:
    """The text of one completion of the prompt `prompt_ids`.

    `decode(ids)` is the tokenizer's, and omits the tokens in `special` (`special_tokens`). A stop string with the text
    of such a token is searched in the text with special tokens.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_ids: list[int],
        stop: tuple[str, ...] = (),
        special: Mapping[int, str] = MappingProxyType({}),
    ):
        self.text = ""
        """The text without the prompt, and without the stop string that ended it."""
        self.has_stopped = False
        self._decode, self.stop, self._special = decode, stop, special
        self._left_out: list[tuple[int, str]] = []
        """Special tokens of the completion: position in `text`, and text."""
        self._holds_special: dict[str, bool] = {}
        self._ids, told = _last_tokens(prompt_ids, decode)
        self._settled = 0
        """Number of ids whose text is final and in `_before`. Only later ids are decoded again, so a long text costs no
        more.
        """
        self._before = ""
        self._prompt_length = len(told)
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Adds a token, and returns the text that can be shown now."""
        self._ids.append(token_id)
        tail = self._decode(self._ids[self._settled :])
        whole = tail.rstrip(REPLACEMENT)  # a character's later bytes are still to come
        self.text = (self._before + whole)[self._prompt_length :]
        if token_id in self._special:
            self._left_out.append((len(self.text), self._special[token_id]))
        if whole == tail:
            self._settle(tail)
        return self._show(is_last=False)

    def hold(self, token_id: int) -> None:
        """Adds a token that is decoded by `flush`. Used for all tokens of a completion or for none."""
        self._ids.append(token_id)

    def flush(self) -> str:
        """Returns the held-back text, at the end of the completion."""
        if not self.has_stopped:
            self.text = (self._before + _with_cut_character(self._ids[self._settled :], self._decode))[
                self._prompt_length :
            ]
        return self._show(is_last=True)

    def _settle(self, tail: str) -> None:
        if len(self._ids) - self._settled > 16:
            ids, kept = _last_tokens(self._ids, self._decode)
            if kept and tail.endswith(kept):
                self._before += tail[: len(tail) - len(kept)]
                self._settled = len(self._ids) - len(ids)

    def _show(self, *, is_last: bool) -> str:
        if not self.has_stopped:
            found = [at for at in map(self._find, self.stop) if at >= 0]
            if found:
                self.text, self.has_stopped = self.text[: min(found)], True
        held = 0 if is_last or self.has_stopped else max(map(self._beginning, self.stop), default=0)
        end = max(self._shown, len(self.text) - held)
        shown, self._shown = self.text[self._shown : end], end
        return shown

    def _find(self, stop: str) -> int:
        """Returns the position of `stop` in `text`, or -1."""
        start = max(0, self._shown - len(stop))
        if not self._is_marked(stop):
            return self.text.find(stop, start)
        said, places = self._with_special(start)
        at = said.find(stop)
        return places[at] if at >= 0 else -1

    def _beginning(self, stop: str) -> int:
        """Returns the number of characters at the end of `text` that may begin `stop`."""
        if not self._is_marked(stop):
            return overlap(self.text, stop)
        said, places = self._with_special(max(0, len(self.text) - len(stop)))
        length = overlap(said, stop)
        return len(self.text) - places[-length] if length else 0

    def _is_marked(self, stop: str) -> bool:
        if stop not in self._holds_special:
            self._holds_special[stop] = any(mark in stop for mark in self._special.values())
        return self._holds_special[stop]

    def _with_special(self, start: int) -> tuple[str, list[int]]:
        """Returns `text` from `start` on with special tokens, and the position of each of its characters in `text`."""
        said, places = "", list[int]()
        for place, mark in [*((place, mark) for place, mark in self._left_out if place >= start), (len(self.text), "")]:
            said += self.text[start:place] + mark
            places += [*range(start, place), *[place] * len(mark)]
            start = place
        return said, places


def _last_tokens(ids: list[int], decode: Callable[[list[int]], str]) -> tuple[list[int], str]:
    """Returns the last CONTEXT_TOKENS of `ids`, or a few more, so that the first of them begins a character; and their
    text.

    Decoders that fall back to bytes make replacement characters of a whole run of bytes whose first character is cut.
    """
    for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
        text = decode(ids[-size:])
        if REPLACEMENT not in text:
            return ids[-size:], text
    return ids[-CONTEXT_TOKENS:], decode(ids[-CONTEXT_TOKENS:])


def _with_cut_character(ids: list[int], decode: Callable[[list[int]], str]) -> str:
    """Returns the text of `ids`. An incomplete last character leaves the complete ones before it intact."""
    text = decode(ids)
    for size in range(1, CHARACTER_TOKENS) if text.endswith(REPLACEMENT) else ():
        before = decode(ids[:-size])
        if not before.endswith(REPLACEMENT):
            return before + decode(ids[-size:])
    return text


def overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`, without being all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
