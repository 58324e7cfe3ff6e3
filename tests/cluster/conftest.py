"""A project folder as users have it, and the words that start it."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if "EE_TUNING_CLUSTER" not in os.environ:
    collect_ignore = [
        "test_slurm.py",
        "test_two_nodes.py",
        "test_latency.py",
    ]  # minutes, and root: `make test-slurm` and `make test-nodes`


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository in a folder with a space in its name, with texts in another one."""
    folder = tmp_path_factory.mktemp("cluster") / "the project"
    folder.mkdir()
    (folder / "ee_tuning").symlink_to(ROOT / "ee_tuning")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "ee_tuning" / "config", folder / "my data", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def python_first() -> dict[str, str]:
    """An environment whose `python` is the one of these tests."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": "",
    }
