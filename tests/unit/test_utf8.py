"""Texts are UTF-8 whatever the locale is, in files, pipes and on the command line."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import nodes

PACKAGE = Path(__file__).parents[2] / "ee_tuning"
NO_UTF8 = {
    **os.environ,
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONPATH": str(PACKAGE.parent),
}


def opened_by_locale(source: Path) -> Iterator[str]:
    """Calls that open a text and do not name its encoding."""
    for call in nodes(source):
        if not isinstance(call, ast.Call) or "encoding" in (
            keys := {keyword.arg: keyword.value for keyword in call.keywords}
        ):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if name == "open" and owner not in ("os", "archive"):
            mode = keys.get("mode") or next(iter(call.args[not isinstance(call.func, ast.Attribute) :]), None)
            is_text = not isinstance(mode, ast.Constant) or "b" not in str(mode.value)
        else:
            starts_process = name in ("run", "Popen", "check_output", "check_call", "call") and keys.keys() & {
                "text",
                "universal_newlines",
            }
            is_text = name in ("read_text", "write_text", "TextIOWrapper", "fdopen") or bool(starts_process)
        if is_text:
            yield f"{source.relative_to(PACKAGE)}:{call.lineno}"


def test_every_text_is_opened_with_an_encoding() -> None:
    """A traceback on a machine whose locale is not UTF-8, such as a minimal container, at the first × in a file of
    ours.
    """
    found = [place for source in sorted(PACKAGE.rglob("*.py")) for place in opened_by_locale(source)]
    assert not found, f"name the encoding at {found}"


def test_a_machine_without_utf8_reads_and_writes_it_all_the_same(tmp_path: Path) -> None:
    """A traceback that says ascii, from a library's own open or from printing ×; a prompt that reaches the model as
    surrogates.
    """
    (tmp_path / "é").write_text("…", encoding="utf-8")
    script = (
        "import sys, os; from ee_tuning.utf8 import *; use_utf8(); from ee_tuning.config.paths import expanded; "
        "print('\\xd7', typed_text(sys.argv[1]), sys.stdin.read(), os.environ['PYTHONUTF8'], open(sys.argv[2]).read(), "
        "open(expanded(sys.argv[3].encode('ascii', 'surrogateescape').decode(), 'x')).read()); print('\\xd7', file=sys.stderr)"
    )
    arguments = ["pömpt", str(tmp_path / "é"), str(tmp_path / "é")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], input="‰".encode(), env=NO_UTF8, capture_output=True, check=True
    )
    assert (done.stdout.decode(), done.stderr.decode()) == ("× pömpt ‰ 1 … …\n", "×\n")


def test_where_the_locale_is_utf8_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that are taken apart, or an environment that is changed for no reason."""
    from ee_tuning import utf8

    monkeypatch.setattr(utf8.locale, "getpreferredencoding", lambda _: "UTF-8")
    monkeypatch.setattr(utf8.os, "environ", {})
    utf8.use_utf8()
    assert utf8.os.environ == {}
    for text in ("é…", "\udcff", "plain"):
        assert utf8.file_path(text) == text and utf8.typed_text(text) == text
