"""JSON that is written here can be read by any reader; JSON of strangers is read whole or refused."""

import ast
import json
import math
from pathlib import Path

import pytest
from sources import nodes

from ee_tuning.json_file import parse_json, parse_strict_json, to_json

ROOT = Path(__file__).parents[2]

OTHERS = {
    "public_benchmarks/confined_program.py": "a program of its own, which may import nothing of the package; texts alone",
    "training_log/metrics.py": "a message from rank to rank, on which NaN stays NaN",
    "data/messages.py": "a text that is looked through, and not written",
    "data/prompt_records.py": "a copy in plain types, as JSON would give it back",
    "data/records.py": "a text that is looked through, and not written",
}
"""Files that may call json.dumps, and for what: nothing that anybody else reads."""


def strictly(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_all_json_is_written_by_one_writer():
    """NaN and Infinity, which json.dumps writes unasked, and which jq, JavaScript, Rust and Go refuse with the whole
    file.
    """
    calls = {}
    for path in [*(ROOT / "ee_tuning").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in nodes(path):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("dump", "dumps", "JSONEncoder")
                and isinstance(node.value, ast.Name)
                and node.value.id == "json"
            ):
                calls[path.relative_to(ROOT / "ee_tuning" if "tools" not in path.parts else ROOT).as_posix()] = (
                    node.lineno
                )
            assert not (isinstance(node, ast.ImportFrom) and node.module == "json"), (
                f"{path} imports from json past the writer"
            )
    assert set(calls) == {"json_file.py", *OTHERS}


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}, {"sort_keys": True}])
def test_what_is_not_finite_becomes_null(layout):
    """One perplexity that overflows, and a whole report that no reader takes."""
    tree = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "Infinity", "d": 1e-320, "é": 2**70}
    assert strictly(to_json(tree, **layout)) == {
        "a": [1.5, None, [None, {"b": None}]],
        "c": "Infinity",
        "d": 1e-320,
        "é": 2**70,
    }
    assert to_json({"x": [0.1, 1e22, None]}) == json.dumps({"x": [0.1, 1e22, None]}), "digests hang on these bytes"


def test_half_a_surrogate_pair_is_written():
    """A prompt that holds one, which JSON can spell and UTF-8 can not: a traceback in place of all records."""
    assert strictly(to_json({"é": "\ud800"}, ensure_ascii=False).encode().decode()) == {"é": "\ud800"}
    assert to_json("é\u2028", ensure_ascii=False) == '"é\u2028"'


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', "[-Infinity]", '{"a": {"b": [1e999]}}', '{"a": 1, "a": 2}', "[" * 100_000, "{"]
)
def test_what_is_no_json_is_refused(text):
    """A number that nothing can write again."""
    with pytest.raises(ValueError, match=r"\w"):
        parse_strict_json(text)
    assert parse_strict_json('{"a": [1, 2.5, "NaN"]}') == parse_json(b'{"a": [1, 2.5, "NaN"]}')
