"""Building the kernels: what is kept, and what happens where they can not be built."""

import fcntl
import logging
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.kernel import build

true_kernels = build.kernels


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a source that compiles at once."""
    monkeypatch.setattr(build, "kernels", build.kernels.__wrapped__)
    monkeypatch.setattr(build, "SOURCE", tmp_path / "source")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "decoding.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setenv("EE_TUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)


needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_processes_that_begin_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of a machine that each run a compiler for a quarter of a minute."""
    builds, run = list[list[str]](), build._run
    monkeypatch.setattr(build, "_run", lambda command: (builds.append(command), run(command)))
    with ThreadPoolExecutor(4) as pool:  # each opens the lock's file for itself, as processes do
        found = list(pool.map(lambda _: build.kernels(), range(4)))
    assert all(each is not None and each.answer() == 42 for each in found)
    assert [("-c" in command, "-shared" in command) for command in builds] == [(True, False), (False, True)]
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".so"]


@needs_compiler
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process that compiles anew; leavings of the build."""
    assert build.kernels() is not None
    kept = list((tmp_path / "cache" / "kernels").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".so"

    def compile_again(command: list[str]) -> None:
        raise AssertionError(command)

    monkeypatch.setattr(build, "_run", compile_again)
    assert build.kernels() is not None


@needs_compiler
def test_a_library_that_is_cut_short_is_built_anew(tmp_path: Path) -> None:
    """A machine that went down while it was written: half the speed from then on, in every process."""
    compiler = build._compiler()
    assert compiler is not None
    library = build._library(compiler)
    library.write_bytes(b"\x7fELF")
    assert build.kernels() is not None
    assert library.stat().st_size > 1000


@needs_compiler
def test_another_processor_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of one machine run on another that shares its home: an illegal instruction."""
    assert build.kernels() is not None
    monkeypatch.setattr(build, "processor", lambda: "another")
    assert build.kernels() is not None
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 2


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A machine without one that can not decode at all, or that is slow and does not say why."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.kernels() is None
    assert "no C++ compiler (CXX, g++ or clang++)" in caplog.text


def test_a_compiler_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its words lost, or a traceback in their place."""
    compiler = tmp_path / "broken++"
    compiler.write_text("#!/bin/sh\necho 'no such option: -fopenmp' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert build.kernels() is None
    assert str(compiler) in caplog.text and "no such option: -fopenmp" in caplog.text
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@needs_compiler
def test_processes_that_wait_do_not_try_a_failing_compiler_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that hangs for two minutes, tried by eight ranks in turn."""
    tried, waiting, flock = list[list[str]](), list[int](), fcntl.flock

    def lock(file: Any, how: int) -> None:
        waiting.append(how)
        flock(file, how)

    def fail(command: list[str]) -> None:
        tried.append(command)
        until = time.monotonic() + 20
        while len(waiting) < 4:  # the others have the lock's file open
            assert time.monotonic() < until
            time.sleep(0.005)
        raise subprocess.TimeoutExpired(command, build.TIMEOUT)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(build, "_run", fail)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: build.kernels(), range(4))) == [None] * 4
    assert len(tried) == 1
    assert list(build.kernel_folder().iterdir()) == []


def test_a_folder_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    """A library that somebody else put there, loaded as one's own."""
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.kernel_folder() != folder
    folder.chmod(0o700)
    assert build.kernel_folder() == folder


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the kernels that nobody can step around."""
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.kernels() is None


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("number", ["float", "double", "BFloat16"])
def test_the_packages_own_sources_compile(monkeypatch: pytest.MonkeyPatch, number: build.Number) -> None:
    """An error in them, of which a line in the log tells: every other test then takes torch's operators."""
    monkeypatch.undo()
    assert true_kernels(number) is not None
