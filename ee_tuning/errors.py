"""The error that faces users. Everything else that goes wrong is a bug of ours and keeps its traceback."""


class InputError(ValueError):
    """Something the user gave can not be used. The message, one line, names the rule, the value and the remedy."""
