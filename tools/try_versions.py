"""Runs the fast tests under other versions of this package's dependencies, and keeps the record in docs/versions.md.

`python tools/try_versions.py` tries every set whose Python is installed, one after the other (gigabytes and half an
hour each), `python tools/try_versions.py NAME …` some of them. Each set gets a virtual environment in build/versions,
which is removed afterwards.
"""

import argparse
import platform
import re
import shutil
import subprocess
import sys
import time
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
Megatron-core, in several processes, too.

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
        if shutil.which(f"python{SETS[name].python}") is None:
            print(f"{name}: there is no python{SETS[name].python} here", file=sys.stderr)
            continue
        row, failures = tried(name, SETS[name], keeps=arguments.keep)
        write_row(row)
        print("\n".join([*failures, "| " + " | ".join(row) + " |"]), flush=True)
        has_failed |= bool(failures)
    return int(has_failed)


def tried(name: str, versions: Versions, *, keeps: bool) -> tuple[list[str], list[str]]:
    """Returns the row of the record, and the lines of failed tests."""
    folder = FOLDER / name
    python = install(folder, versions)
    row, failures = [name, *installed(python)], list[str]()
    for tests in TESTS.values():
        command = [str(python), "-m", "pytest", "--quiet", "--numprocesses", "2", "--dist", "loadfile", *tests]
        begun = time.monotonic()
        said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        (FOLDER / f"{name}.log").write_text(said, encoding="utf-8")
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said[-400:])}
        failed = counts.get("failed", 0) + counts.get("error", 0) + (not counts)
        row.append(f"{counts.get('passed', 0)} / {failed} / {counts.get('skipped', 0)}")
        failures += [line for line in said.split("\n") if line.startswith(("FAILED", "ERROR"))] if failed else []
        failures += [said[-2000:]] if failed and not failures else []
        print(f"{name}: {row[-1]} in {time.monotonic() - begun:.0f} s", flush=True)
    if not keeps:
        shutil.rmtree(folder)
    return [*row, f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, CPU"], failures


def install(folder: Path, versions: Versions) -> Path:
    """Makes the virtual environment and returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([f"python{versions.python}", "-m", "venv", str(folder)], check=True)
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
