"""Files of lines are read alike, whoever reads them: prompts, data, metrics."""

import json
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer

from ee_tuning.data.documents import file_ranges, read_documents
from ee_tuning.data.encoding import recipe_of, tokenize_range
from ee_tuning.generation.prompts import read_prompts
from ee_tuning.line_file import read_lines
from ee_tuning.training_log.metrics import MetricsFile

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
"""Characters that str.splitlines ends a line at. JSON takes the first three within its texts as they are."""
PACKAGE = Path(__file__).parents[2] / "ee_tuning"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        (b"a\rb\n", ["a\rb"]),
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (b"a\n\xef\xbb\xbfb\n", ["a", "b"]),
        (f"{SEPARATORS}\nz".encode(), [SEPARATORS, "z"]),
        (b"\xef\xbb\xbf", []),
    ],
)
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, content: bytes, wanted: list[str]) -> None:
    """A text that holds U+2028 is cut in two, neither of which is JSON; a byte order mark is taken for a part of the
    first line.
    """
    (tmp_path / "lines").write_bytes(content)
    assert read_lines(tmp_path / "lines") == wanted


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_prompts_and_documents_are_cut_alike(tmp_path: Path, mark: bytes, end: str) -> None:
    """A file that data takes and prompts refuse; our own output, which holds what the model said as it is, that can not
    be read back.
    """
    texts = ["first\u2028line", "second\u2029", "\x85third", "fourth"]
    lines = [json.dumps({"prompt": text, "text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(mark + end.join([*lines, ""]).encode())
    assert [line["prompt"] for line in read_prompts(path)] == texts
    assert [document for piece in file_ranges([path]) for document in read_documents(piece, "text")] == texts
    write_byte_tokenizer(tmp_path / "tokenizer")
    assert len(tokenize_range(file_ranges([path])[0], recipe_of(tmp_path / "tokenizer", "text", None)).lengths) == 4


def test_records_of_a_run_survive_bytes_that_a_crash_left(tmp_path: Path) -> None:
    """A run that can not go on, by a traceback, because the power went while its last record was written."""
    good = [{"kind": "validation", "step": step} for step in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in good) + b'{"kind": "tr\xff\x00\x00')
    MetricsFile(path, resume_after=1).close()
    assert [json.loads(line) for line in read_lines(path)] == good[:1]


def test_no_file_is_cut_by_splitlines() -> None:
    """The next reader of lines that cuts texts at U+2028 again."""
    wrong = [path.name for path in PACKAGE.rglob("*.py") if ".splitlines(" in path.read_text(encoding="utf-8")]
    assert not wrong, f"{wrong}: read lines by ee_tuning.line_file"
