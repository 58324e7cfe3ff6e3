"""The benchmark of engines refuses what it was not tried with, before minutes of work."""

from pathlib import Path

import engines
import pytest

from ee_tuning.errors import InputError


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
