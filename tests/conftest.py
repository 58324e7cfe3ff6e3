"""Makes modules that several test folders share importable, and the CPU the device of all tests but tests/gpu."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from world import World

# Before torch is imported: these tests compare CPU with CPU. tests/gpu starts processes that see what was to be seen.
os.environ.setdefault("EE_TUNING_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder's may be one on the hub: no test asks there
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `make test &`: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


FOLDERS = ("distributed", "stress", "parity", "unit")
"""Those with the longest files first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a worker of xdist that began one last would work alone for its time."""
    is_long = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> tuple[int, bool]:
        folder = item.path.parent.name
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS), item.path not in is_long

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What was imported is not looked at again when layouts, of which each test makes some, collect rubbish."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    """Token ids of a test are not kept in the home folder; processes that tests start inherit it.

    Kernels are kept in pytest's cache: to compile them takes a minute of a core. Their name is a digest of the sources.
    """
    folder = tmp_path_factory.mktemp("cache")
    if cache := getattr(pytestconfig, "cache", None):
        with suppress(OSError):  # a checkout that may not be written: they are compiled for this session
            kernels = cache.mkdir("kernels")
            kernels.chmod(0o700)
            (folder / "kernels").symlink_to(kernels)
    os.environ["EE_TUNING_CACHE"] = str(folder)


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


@pytest.fixture(scope="session")
def world() -> "Iterator[World]":
    """`world.run(function, *args)` calls a module-level function on four ranks and returns their results by rank."""
    from world import World  # tests/ is on the path now

    shared = World()
    yield shared
    shared.stop()
