"""The spins of torch's threads, which a busy machine multiplies."""

import os
import subprocess
import sys

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


@pytest.mark.parametrize(
    "program", ["from ee_tuning import EarlyExitLLM", "from ee_tuning import cli; cli.main(['inspect', 'x'])"]
)
def test_openmp_reads_it_when_torch_is_loaded(program: str) -> None:
    """A variable that is set after `import torch`, which has no effect any more."""
    script = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "            os._exit(0)\n"
        f"sys.meta_path.insert(0, Finder())\n{program}\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SPINS]
