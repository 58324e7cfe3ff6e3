"""A few of the deaths that `make stress` deals by the hundred."""

from pathlib import Path

import pytest
from kills import stress_saves, stress_tuning
from nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return Nursery()


def test_a_killed_save_leaves_what_was_or_what_is_to_be(tmp_path: Path, nursery: Nursery) -> None:
    """Half an output that loads, a former one that is gone, a lock or litter that the next try stumbles over."""
    assert stress_saves(4, 0, tmp_path, nursery).failures == []


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, nursery: Nursery) -> None:
    """Half a checkpoint taken for the latest; a step done twice, or never."""
    assert stress_tuning(5, 0, tmp_path, nursery).failures == []
