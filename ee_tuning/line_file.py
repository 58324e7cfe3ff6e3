"""Files of lines, such as JSON lines.

Only a line feed ends a line. str.splitlines also splits at U+2028, U+2029, U+0085 and others, which JSON allows within
texts.
"""

from pathlib import Path

_BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """Returns the lines of a UTF-8 file without their ends (LF or CR LF) and without a byte order mark.

    `errors` is as for bytes.decode. Raises OSError, and UnicodeDecodeError where the file is not UTF-8.
    """
    lines = [line_text(line, errors) for line in path.read_bytes().split(b"\n")]
    return lines if lines[-1] else lines[:-1]


def line_text(line: bytes, errors: str = "strict") -> str:
    """Decodes one line like `read_lines`. A byte order mark may begin any line, because files with one are joined by
    cat.
    """
    return line.decode("utf-8", errors).removeprefix(_BYTE_ORDER_MARK).removesuffix("\n").removesuffix("\r")
