"""docs/troubleshooting.md quotes messages that the code has."""

import ast
import functools
import re
from pathlib import Path

import pytest
from sources import nodes

ROOT = Path(__file__).parents[2]
QUOTED = re.findall(r"\*\*`([^`]+)`\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))


@functools.cache
def messages() -> tuple[str, ...]:
    """Every text of the package's sources; a value within it is a NUL."""
    found = []
    for path in sorted((ROOT / "ee_tuning").rglob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_exist(quoted: str) -> None:
    """A user who searches the page for a message that has been reworded finds nothing."""
    fixed = [part.strip() for part in quoted.split("…") if part.strip()]
    assert any(all(part in message for part in fixed) for message in messages()), quoted


def test_messages_are_quoted() -> None:
    """A page laid out differently would be checked for nothing."""
    assert len(QUOTED) > 20
