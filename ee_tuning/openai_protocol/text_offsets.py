"""Offsets of tokens in a text, in characters."""

_MOST_SKIPPED = 8
"""Most bytes between two tokens that belong to neither."""


class TextOffsets:
    """Offsets of consecutive tokens of a text that begins with `known`."""

    def __init__(self, known: str):
        self._known = known.encode("utf-8", errors="replace")
        self._at_byte = self._at_character = 0

    def next(self, token: bytes) -> int:
        """Returns the offset of the next token, which has these bytes. A token that is not in the known text, such as a
        beginning of text, has length 0.
        """
        if self._at_byte < len(self._known):
            # Tokenizers that mark words by a leading space decode a single token without it.
            found = self._known.find(token, self._at_byte, self._at_byte + len(token) + _MOST_SKIPPED)
            if found < 0:
                return self._at_character
            self._move(self._known[self._at_byte : found])
            token = self._known[found : found + len(token)]
        place = self._at_character
        self._move(token)
        return place

    def _move(self, passed: bytes) -> None:
        self._at_byte += len(passed)
        self._at_character += sum([byte & 0xC0 != 0x80 for byte in passed])
