"""Where tokens begin in a text, in characters."""

_MOST_SKIPPED = 8
"""Bytes between two tokens that the text of neither has."""


class TextOffsets:
    """The places of tokens, one after the other, of a text that begins with `known`."""

    def __init__(self, known: str):
        self._known = known.encode("utf-8", errors="replace")
        self._at_byte = self._at_character = 0

    def next(self, token: bytes) -> int:
        """The place of the next token, whose bytes these are. A token that the known text leaves out, as a beginning of
        text, takes no room in it.
        """
        if self._at_byte < len(self._known):
            # Tokenizers that write words with a space before them show a token alone without it.
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
