"""Files of lines, such as JSON lines: one way to read them, wherever they come from.

A line ends at a line feed alone. str.splitlines also ends one at U+2028, U+2029, U+0085 and others, which JSON allows
within its texts.
"""

from pathlib import Path

_BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a UTF-8 file, without their ends (line feed, or carriage return and line feed) and without a byte
    order mark.

    `errors` is what str.decode takes. Raises OSError, and UnicodeDecodeError where the file is no UTF-8.
    """
    lines = [line_text(line, errors) for line in path.read_bytes().split(b"\n")]
    return lines if lines[-1] else lines[:-1]


def line_text(line: bytes, errors: str = "strict") -> str:
    """One line of a UTF-8 file as `read_lines` gives it. A byte order mark may begin any line: files that have one are
    joined by cat.
    """
    return line.decode("utf-8", errors).removeprefix(_BYTE_ORDER_MARK).removesuffix("\n").removesuffix("\r")
