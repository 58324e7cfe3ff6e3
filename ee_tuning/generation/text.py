"""Token ids to text while they come: characters are held until whole, and stop strings are cut before anyone sees them."""
from collections.abc import Callable

REPLACEMENT = "�"


class TextStream:
    """The text of one completion. `decode(ids)` is the tokenizer's."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        self.decode, self.stop = decode, stop
        self.text = ""
        self.has_stopped = False
        self._ids: list[int] = []
        self._settled = 0
        """Ids before this one are in `text` for good; decoding restarts here, so that a long completion costs no more per token."""
        self._settled_text = ""
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that can be shown now."""
        self._ids.append(token_id)
        tail = self.decode(self._ids[self._settled:])
        if tail.endswith(REPLACEMENT):  # a character's later bytes are still to come
            return ""
        self.text = self._settled_text + tail
        self._settle(tail)
        return self._show(self._first_stop())

    def flush(self) -> str:
        """The text held back, at the end of the completion."""
        if not self.has_stopped:
            self.text = self._settled_text + self.decode(self._ids[self._settled:])
        shown, self._shown = self.text[self._shown:], len(self.text)
        return shown

    def _settle(self, tail: str) -> None:
        # Two tokens of context stay: some tokenizers join a token to its neighbour with a space.
        if len(self._ids) - self._settled > 16:
            kept = self.decode(self._ids[-2:])
            if tail.endswith(kept):
                self._settled_text += tail[: len(tail) - len(kept)]
                self._settled = len(self._ids) - 2

    def _first_stop(self) -> int | None:
        found = [at for at in (self.text.find(s, max(0, self._shown - len(s))) for s in self.stop) if at >= 0]
        return min(found) if found else None

    def _show(self, stop_at: int | None) -> str:
        if stop_at is not None:
            self.text, self.has_stopped = self.text[:stop_at], True
            return self.flush()
        end = len(self.text) - max((_overlap(self.text, s) for s in self.stop), default=0)
        shown, self._shown = self.text[self._shown:end], max(self._shown, end)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
