"""Single tokens as text and bytes, for log-probabilities."""

from typing import Any

_REPLACED = "�"


class TokenTexts:
    """The text and the bytes of each token of a tokenizer. A token may be a part of a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._bytes_of = _byte_level() if _is_byte_level(tokenizer) else {}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the bytes of a token."""
        if token_id not in self._known:
            self._known[token_id] = self._bytes(token_id)
        return self._known[token_id]

    def text(self, token_id: int) -> str:
        """Returns the text of a token, with replacement characters where its bytes are no whole text."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def _bytes(self, token_id: int) -> bytes:
        said: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if _REPLACED not in said or token_id in self._special:
            return said.encode("utf-8", errors="replace")
        piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if self._bytes_of and all(letter in self._bytes_of for letter in piece):
            return bytes(self._bytes_of[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return said.encode("utf-8", errors="replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(type(backend.decoder)) + repr(backend.decoder)


def _byte_level() -> dict[str, int]:
    """Returns letter -> byte, as byte-level tokenizers since GPT-2 write bytes: printable ones as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
