"""Runs the fast tests under other versions of this package's dependencies, and keeps the record in docs/versions.md.

`python tools/try_versions.py` tries every set whose Python is installed, one after the other (gigabytes and half an
hour each), `python tools/try_versions.py NAME …` some of them. Each set gets a virtual environment in build/versions,
which is removed afterwards.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "versions.md"
FOLDER = ROOT / "build" / "versions"
TESTS = {
    "fast": ["tests/unit", "-m", "not slow"],
    "Megatron": [
        "tests/unit/test_megatron_formats.py",
        "tests/distributed/test_ways_in.py",
        "tests/distributed/test_round_trip.py",
        "tests/distributed/test_export_megatron.py",
        "tests/distributed/test_experts_in_megatron.py",
        "tests/distributed/test_newer_megatron_layouts.py",
        "tests/parity/test_backbone.py",
    ],
}
"""Column -> arguments of pytest: `make test-fast`, and the files that go through most of Megatron-core."""


class Versions(NamedTuple):
    """A set of versions that users may have together. An empty string stands for pip's own choice."""

    python: str
    torch: str
    transformers: str
    megatron_core: str


SETS = {
    "oldest": Versions("3.11", "2.10.0", "5.18.0", "0.16.1"),
    "transformers-5.18": Versions("3.11", "2.13.0", "5.18.0", "0.16.1"),
    "pinned": Versions("3.11", "2.13.0", "", "0.16.1"),
    "newest": Versions("3.11", "2.14.1", "", "0.16.1"),
    "newest-3.12": Versions("3.12", "2.14.1", "", "0.19.2"),
    "newest-3.13": Versions("3.13", "2.14.1", "", "0.19.2"),
}

_HEAD = """# Versions

Written by `make test-versions`: a virtual environment for each set, `pip install '.[dev]'` with these versions, and the tests named at the
top of the columns (passed / failed / skipped). `fast` are those of `make test-fast`, `Megatron` the files that go through most of
Megatron-core, in several processes, too. Tests that fail beside others are run again, one at a time, and the second result counts.
A row counts the tests of its day, at the commit in the last column: from one day to the next tests are added, or become slow ones.

| set | Python | torch | transformers | Megatron-core | fast | Megatron | on |
|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    """Returns the exit code: 0 where all tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sets to try: {', '.join(SETS)} (default: all)")
    parser.add_argument("--keep", action="store_true", help="leave the virtual environments in build/versions")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    has_failed = False
    for name in arguments.names or SETS:
        base = working_python(SETS[name].python)
        if base is None:
            print(f"{name}: there is no python{SETS[name].python} that starts here", file=sys.stderr)
            has_failed |= name in arguments.names
            continue
        try:
            row, failures = tried(name, SETS[name], base, keeps=arguments.keep)
        except subprocess.CalledProcessError as error:  # pip has said why
            print(f"{name}: not installed; {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
            has_failed = True
            continue
        write_row(row)
        print("\n".join([*failures, "| " + " | ".join(row) + " |"]), flush=True)
        has_failed |= bool(failures)
    return int(has_failed)


def working_python(version: str) -> str | None:
    """Returns the path of this Python, or None where none starts: pyenv's shim for a version that is installed and not
    chosen lies on the path, too, and only prints an error.
    """
    for folder in os.get_exec_path():
        command = shutil.which(f"python{version}", path=folder)
        if command and subprocess.run([command, "--version"], capture_output=True).returncode == 0:
            return command
    return None


def tried(name: str, versions: Versions, base: str, *, keeps: bool) -> tuple[list[str], list[str]]:
    """Returns the row of the record, and the lines of what failed. Raises CalledProcessError where pip does."""
    folder = FOLDER / name
    python = install(folder, versions, base)
    row, failures = [name, *installed(python)], list[str]()
    for column, tests in TESTS.items():
        begun = time.monotonic()
        counts, failed = run_tests(python, tests, FOLDER / f"{name}-{column}")
        row.append(counts)
        failures += failed
        print(f"{name}: {column} {counts} in {time.monotonic() - begun:.0f} s", flush=True)
    if not keeps:
        shutil.rmtree(folder)
    return [
        *row,
        ", ".join(filter(None, (time.strftime("%Y-%m-%d"), commit(ROOT), platform.machine(), "CPU"))),
    ], failures


def commit(folder: Path) -> str:
    """Returns the short hash of the commit that is checked out in `folder`, or "" outside git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:  # git itself is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_tests(python: Path, tests: list[str], outputs: Path) -> tuple[str, list[str]]:
    """Runs tests, and again what failed. Returns the text for the record and the lines of what failed twice.

    `outputs`: where the output goes, with `.log` and `-again.log` behind it.
    """
    command = [str(python), "-m", "pytest", "--quiet", "-o", f"cache_dir={outputs}.cache", *tests]
    said = printed([*command, "--numprocesses", "2", "--dist", "loadfile"], Path(f"{outputs}.log"))
    counts, again = counted(said), Counter[str]()
    if counts.total() and counts["failed"] + counts["error"]:
        said = printed([*command, "--last-failed", "--last-failed-no-failures", "none"], Path(f"{outputs}-again.log"))
        again = counted(said)
        if again.total():  # else pytest itself ended early
            counts.update(passed=again["passed"])
            counts.update({kind: again[kind] - counts[kind] for kind in ("failed", "error")})
    failed = counts["failed"] + counts["error"] + (not counts.total())
    text = f"{counts['passed']} / {failed} / {counts['skipped']}"
    text += f" ({again['passed']} at the second try)" if again["passed"] else ""
    lines = [line for line in said.split("\n") if line.startswith(("FAILED", "ERROR"))] if failed else []
    return text, lines or ([said[-2000:]] if failed else [])


def printed(command: list[str], log: Path) -> str:
    """Returns what a command prints, and writes it to `log`, too."""
    said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    log.write_text(said, encoding="utf-8")
    return said


def counted(said: str) -> Counter[str]:
    """Returns pytest's counts of passed, failed, skipped and error, from the last line that has them."""
    lines = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)* in [\d.]+s)", said, re.MULTILINE)
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    return Counter({word: int(number) for number, word in found})


def install(folder: Path, versions: Versions, base: str) -> Path:
    """Makes the virtual environment and returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [
        f"{package}=={version}" if version else package
        for package, version in zip(("torch", "transformers", "megatron-core"), versions[1:], strict=True)
    ]
    subprocess.run([*pip, wanted[0]], check=True)
    subprocess.run([*pip, *wanted, "--editable", f"{ROOT}[dev]"], check=True)
    return python


def installed(python: Path) -> list[str]:
    """Returns the versions of Python, torch, transformers and Megatron-core that were installed."""
    code = (
        "import platform; from importlib.metadata import version; print(platform.python_version(), *map(version, "
        "('torch', 'transformers', 'megatron-core')))"
    )
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.split()


def write_row(row: list[str]) -> None:
    """Puts the row into the record, in place of the set's former one."""
    lines = RECORD.read_text(encoding="utf-8").split("\n") if RECORD.exists() else []
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if re.match(r"\| (\w|[-.])+ \| \d", line)}
    rows[row[0]] = "| " + " | ".join(row) + " |"
    notes = "\n".join(lines).partition("\n## ")[1:]  # text written by hand beneath the table is kept
    order = [*(name for name in SETS if name in rows), *(name for name in rows if name not in SETS)]
    RECORD.write_text(_HEAD + "\n".join(rows[name] for name in order) + "\n" + "".join(notes), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
