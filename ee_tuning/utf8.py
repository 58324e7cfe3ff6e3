"""Makes files, pipes and the command line UTF-8 in every locale, so that a job has the same texts everywhere."""

import io
import locale
import os
import sys
from contextlib import suppress


def use_utf8() -> None:
    """Sets UTF-8 for this process and its children. A terminal keeps its encoding, with escapes for what it can not
    show.
    """
    if locale.getpreferredencoding(False).replace("-", "").lower() != "utf8":
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
        with suppress(locale.Error):  # torch, for example, opens files without an encoding
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed; a calling program may have replaced it
            encoding = stream.encoding if stream.isatty() else "utf-8"
            with suppress(io.UnsupportedOperation):  # a calling program has already read from it
                stream.reconfigure(encoding=encoding, errors="strict" if stream is sys.stdin else "backslashreplace")


def typed_text(argument: str) -> str:
    """Decodes an argument as UTF-8, which Python decoded by the locale. Keeps it where it is not UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def file_path(path: str) -> str:
    """Returns a path from a file or a caller such that the system can open it even if the locale lacks its
    characters.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return path
