"""Files, pipes and the command line are UTF-8, whatever the machine's locale is: a job has the same texts
everywhere.
"""

import io
import locale
import os
import sys
from contextlib import suppress


def use_utf8() -> None:
    """Sets UTF-8 for this process and its children. A terminal keeps its encoding, and gets what it can not show
    escaped.
    """
    if locale.getpreferredencoding(False).replace("-", "").lower() != "utf8":
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
        with suppress(locale.Error):  # libraries open files of their own, and name no encoding: torch does
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # none where it is closed; a program that calls this one may have put its own there
            encoding = stream.encoding if stream.isatty() else "utf-8"
            with suppress(io.UnsupportedOperation):  # a program that calls this one has read from it already
                stream.reconfigure(encoding=encoding, errors="strict" if stream is sys.stdin else "backslashreplace")


def typed_text(argument: str) -> str:
    """A text from the command line, which Python decodes as the locale says. It stays as it is where it is no UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def file_path(path: str) -> str:
    """A path that a file or a caller gave, so that the system can open it though the locale lacks its characters."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(path.encode("utf-8", "surrogateescape"))
    return path
