"""The spins of torch's threads, which a busy machine multiplies."""

import os

import pytest

import ee_tuning
from ee_tuning.openmp import SPINS


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "spins", "policy"],
)
def test_a_program_that_imports_the_class_spins_as_briefly_as_the_commands(monkeypatch, given, spins):
    """A program of one's own beside another busy process: its prompts took ten times as long."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ee_tuning.__getattr__("EarlyExitLLM").__name__ == "EarlyExitLLM"
    assert os.environ.get("GOMP_SPINCOUNT") == spins
