"""What `make test-versions` puts into its record."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tools.try_versions import ROOT, SETS, commit, counted, working_python


def test_a_shim_of_a_python_that_is_not_chosen_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv's shim lies on the path for every installed version, and an error of it ended the whole record."""
    for folder, code in (("shims", 127), ("real", 0)):
        program = tmp_path / folder / "python3.12"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}")
    assert working_python("3.12") is None
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'real'}")
    assert working_python("3.12") == str(tmp_path / "real" / "python3.12")
    assert working_python("3.13") is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "....\n2337 passed, 5 skipped, 12 warnings in 61.06s (0:01:01)\n",
            {"passed": 2337, "skipped": 5},
        ),
        (
            "FAILED tests/a.py::b - AssertionError: 3 passed\n=== 2 failed, 80 passed in 5.10s ===\nERROR: exit 1 failed\n",
            {"failed": 2, "passed": 80},
        ),
        ("2 errors in 1.00s\n", {"error": 2}),
        ("Killed\n", {}),
    ],
    ids=["passed", "words of a test", "collection", "killed"],
)
def test_counts_come_from_pytests_last_line(said: str, expected: dict[str, int]) -> None:
    """Figures out of a test's own words, or failures that a dead pytest did not count."""
    assert dict(counted(said)) == expected


def test_what_the_package_promises_is_what_is_tried() -> None:
    """A Python in the metadata that no check runs on, or a bound that moved in setup.py alone."""
    metadata = (ROOT / "setup.py").read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", metadata)
    assert pythons == workflow["jobs"]["run"]["strategy"]["matrix"]["python"]
    assert set(pythons) == {each.python for each in SETS.values()}
    oldest, newest = SETS["oldest"], SETS["newest-3.12"]
    assert f'python_requires=">={oldest.python}"' in metadata and f'"torch>={oldest.torch}a0"' in metadata
    assert f'"transformers>={oldest.transformers.removesuffix(".0")},' in metadata
    bounds = re.search(r'"megatron-core>=([\d.]+),<0\.(\d+)"', metadata)
    assert bounds and bounds[1] == oldest.megatron_core
    assert newest.megatron_core.startswith(f"0.{int(bounds[2]) - 1}.")


def test_a_row_names_the_commit_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that belong to tests of an unknown day; a record that ends where there is no git."""
    assert commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", commit(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == ""
