"""Plain text tables, alike in terminals and files."""

from collections.abc import Sequence


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 0) -> list[str]:
    """Returns the lines of a table. The first `num_left` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            word.ljust(width) if place < num_left else word.rjust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
