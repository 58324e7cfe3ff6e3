"""Token ids to text while they come: characters are held until whole, and stop strings are cut before anyone sees them."""
from collections.abc import Callable

REPLACEMENT = "�"
CONTEXT_TOKENS = 4
"""Tokens of the prompt that are decoded with the completion: some tokenizers drop the space that a text begins with."""


class TextStream:
    """The text of one completion of the prompt `prompt_ids`. `decode(ids)` is the tokenizer's."""

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: list[int], stop: tuple[str, ...] = ()):
        self.text = ""
        """Without the prompt, and without the stop string where one was met."""
        self.has_stopped = False
        self._decode, self.stop = decode, stop
        self._ids = prompt_ids[-CONTEXT_TOKENS:]
        self._settled = 0
        """Ids before this one have their text in `_before` for good: decoding restarts here, so that length costs nothing."""
        self._before = ""
        self._prompt_length = len(decode(self._ids))
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that can be shown now."""
        self._ids.append(token_id)
        tail = self._decode(self._ids[self._settled:])
        whole = tail.rstrip(REPLACEMENT)  # a character's later bytes are still to come
        self.text = (self._before + whole)[self._prompt_length:]
        if whole == tail:
            self._settle(tail)
        return self._show(is_last=False)

    def hold(self, token_id: int) -> None:
        """Adds a token whose text is wanted no sooner than `flush`; for all tokens of a completion or none."""
        self._ids.append(token_id)

    def flush(self) -> str:
        """The text held back, at the end of the completion."""
        if not self.has_stopped:
            self.text = (self._before + self._decode(self._ids[self._settled:]))[self._prompt_length:]
        return self._show(is_last=True)

    def _settle(self, tail: str) -> None:
        if len(self._ids) - self._settled > 16:
            kept = self._decode(self._ids[-CONTEXT_TOKENS:])
            if kept and tail.endswith(kept):
                self._before += tail[: len(tail) - len(kept)]
                self._settled = len(self._ids) - CONTEXT_TOKENS

    def _show(self, *, is_last: bool) -> str:
        if not self.has_stopped:
            found = [at for at in (self.text.find(s, max(0, self._shown - len(s))) for s in self.stop) if at >= 0]
            if found:
                self.text, self.has_stopped = self.text[: min(found)], True
        held = 0 if is_last or self.has_stopped else max((_overlap(self.text, s) for s in self.stop), default=0)
        end = max(self._shown, len(self.text) - held)
        shown, self._shown = self.text[self._shown:end], end
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
