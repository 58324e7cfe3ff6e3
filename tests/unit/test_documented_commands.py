"""Commands and programs in README.md, docs/ and examples/ are ones that exist."""

import re
import shlex
from pathlib import Path

import pytest

from ee_tuning import cli
from ee_tuning.config import load_config
from ee_tuning.tuning.settings import objective

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "examples" / "README.md"]
PROGRAM = re.compile(r"^(?:    )?((?:ee-tuning|torchrun|python -m ee_tuning) .*)$", re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The command lines of code blocks, continued lines joined; without those that leave something out ("…")."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return [line.partition("  #")[0] for line in PROGRAM.findall(text) if "…" not in line]


COMMANDS = {
    f"{page.relative_to(ROOT)}-{number}": line for page in PAGES for number, line in enumerate(commands(page), 1)
}
PROGRAMS = {
    f"{page.relative_to(ROOT)}-{number}": source
    for page in PAGES
    for number, source in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_documented_commands_parse(line: str) -> None:
    """A flag that was renamed, or a value that is refused, in the first command that a reader copies."""
    words = shlex.split(line)
    name = next(place for place, word in enumerate(words) if word in {command.name for command in cli.COMMANDS})
    parsed = cli.parse(words[name:])
    config = load_config(None, parsed.overrides)
    assert parsed.command.name == words[name] and objective(config.tuning)


@pytest.mark.parametrize("source", PROGRAMS.values(), ids=PROGRAMS)
def test_documented_programs_compile(source: str) -> None:
    """A program that ends in a SyntaxError."""
    compile(source, "documentation", "exec")


def test_every_command_is_in_the_table() -> None:
    """A new command that nobody finds."""
    listed = re.findall(
        r"^\| `ee-tuning ([a-z-]+)`", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(listed) == {command.name for command in cli.COMMANDS}


def test_messages_and_cards_name_commands_that_exist() -> None:
    """A remedy, or a model's README.md, that sends its reader to `ee-tuning benchmark`."""
    named = {
        name
        for path in (ROOT / "ee_tuning").rglob("*.py")
        for name in re.findall(r"ee-tuning ([a-z]+)", path.read_text(encoding="utf-8"))
    }
    assert named == {command.name for command in cli.COMMANDS}


def test_commands_are_found() -> None:
    """A pattern that no longer matches the pages would test nothing."""
    assert len(COMMANDS) > 20 and len(PROGRAMS) >= 5
