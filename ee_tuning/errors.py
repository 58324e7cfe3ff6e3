"""The error that faces users. Everything else that goes wrong is a bug of ours and keeps its traceback."""

_MAX_CHARACTERS = 1000


class InputError(ValueError):
    """Something the user gave can not be used. The message, one line, names the rule, the value and the remedy.

    A value may come from a hostile file: what is no plain text in it is escaped, and of a very long message the middle
    is left out.
    """

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
        half = _MAX_CHARACTERS // 2 - 2
        super().__init__(text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}")
