"""The error for users' mistakes. Any other exception is a bug and keeps its traceback."""

_MAX_CHARACTERS = 1000


class InputError(ValueError):
    """An input can not be used. The message is one line with the rule, the value and the remedy.

    A value may come from a malicious file, so control characters are escaped, and a very long message is shortened in
    the middle.
    """

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
        half = _MAX_CHARACTERS // 2 - 2
        super().__init__(text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}")
