"""The benchmark of engines, and their tests, refuse what they were not tried with, before minutes of work."""

import os
import subprocess
import sys
from pathlib import Path

import engines
import pytest

from ee_tuning.errors import InputError

ROOT = Path(__file__).parents[2]


def python_with(folder: Path, version: str) -> Path:
    """A stand-in for an environment's Python, whose vLLM is of that version; "" for none."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nprintf '{version}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "named"), [("0.31.0", "--any-version"), ("", "make test-engines"), (engines.VERSION, "")]
)
def test_an_engine_of_an_untried_version_is_refused(tmp_path: Path, version: str, named: str) -> None:
    """Figures of a version that nobody asked for, under the name of another."""
    python = python_with(tmp_path, version)
    if not named:
        engines.check_version(python, any_version=False)
        return
    with pytest.raises(InputError) as error:
        engines.check_version(python, any_version=False)
    assert named in str(error.value) and "\n" not in str(error.value)
    if version:
        engines.check_version(python, any_version=True)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.31.0", ""])
def test_the_tests_of_engines_end_with_one_line_where_the_version_is_untried(tmp_path: Path, version: str) -> None:
    """A traceback after an engine's run, and after that the same for each of its tests."""
    python = python_with(tmp_path, version)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "engines"],
        env={**os.environ, "EE_TUNING_ENGINES": str(python)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stdout.split("\n") if "Exit" in line]
    wanted = (version, engines.VERSION, ".venv-engines") if version else ("EE_TUNING_ENGINES",)
    assert done.returncode == 2 and len(told) == 1, done.stdout
    assert all(word in told[0] for word in (*wanted, "make test-engines")), told
    assert "Traceback" not in done.stdout + done.stderr


def test_no_python_at_all_is_refused(tmp_path: Path) -> None:
    """A traceback for a path with a slip of the finger."""
    with pytest.raises(InputError, match="--engines"):
        engines.check_version(tmp_path / "nothing", any_version=False)


@pytest.mark.parametrize(
    ("prompts", "drafts", "named"), [(0, [3], "--prompts"), (17, [3], "--prompts"), (8, [2, 0], "--drafts")]
)
def test_counts_that_can_not_be_are_refused(prompts: int, drafts: list[int], named: str) -> None:
    """Rates of fewer prompts than the table tells, or an engine's traceback after minutes."""
    engines.check_counts(16, [1])
    with pytest.raises(InputError, match=named):
        engines.check_counts(prompts, drafts)


def test_every_way_to_draft_has_a_config(tmp_path: Path) -> None:
    """A head that is given and not run."""
    configs = engines.speculative_configs(tmp_path / "draft", tmp_path / "eagle3", [2, 4])
    assert [configs[f"EAGLE-3, {count} drafts"]["num_speculative_tokens"] for count in (2, 4)] == [2, 4]
    assert engines.speculative_configs(tmp_path, None)["ngram"]["num_speculative_tokens"] == engines.NUM_DRAFTS
