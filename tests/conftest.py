"""Makes modules that several test folders share importable, and the CPU the device of all tests but tests/gpu."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: these tests compare CPU with CPU. tests/gpu starts processes that see what was to be seen.
os.environ.setdefault("EE_TUNING_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder's may be one on the hub: no test asks there
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `make test &`: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token ids of a test are not kept in the home folder; processes that tests start inherit it."""
    os.environ["EE_TUNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What processes that tests start leave when they are killed goes with the tests' own folders."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in one order, whatever the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _no_rubbish_between_modules() -> Iterator[None]:
    """Process groups that only cycles still hold keep threads, each of which wakes a hundred times a second. What stays
    is not looked at again.
    """
    yield
    gc.collect()
    gc.freeze()
