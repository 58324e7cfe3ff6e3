"""Builds the kernels of this folder with the machine's own C++ compiler, for its own processor, once; later processes
reuse them.

Without a compiler, or if it fails, decoding uses torch's operators, which are slower. The environment variable
EE_TUNING_KERNEL=0 selects these, too.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Literal, TextIO

from ee_tuning.cache_folder import VARIABLE, cache_folder, check_writable, is_private

SOURCE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
SWITCH = "EE_TUNING_KERNEL"
TIMEOUT = 120
"""Seconds that a compiler may take."""

log = logging.getLogger(__name__)


Number = Literal["float", "double", "BFloat16"]
"""Number type of the tensors, as the sources call it; see numbers.h."""


@cache
def kernels(number: Number = "float") -> ctypes.CDLL | None:
    """Returns the built kernels; None where they are not available, which is logged once."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        log.warning(
            "no C++ compiler (CXX, g++ or clang++): decoding on this processor takes torch's operators, about half as fast"
        )
        return None
    try:
        return _loaded(compiler, number)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "the decoding kernels could not be built with %s, torch's operators serve in their place, about half as fast: %s",
            compiler,
            _said(error)[-400:],
        )
        return None


def _said(error: OSError | subprocess.SubprocessError) -> str:
    """Returns what the compiler printed, or else the error's text."""
    return str(getattr(error, "stderr", None) or error).strip()


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def _loaded(compiler: str, number: Number) -> ctypes.CDLL:
    """Returns the library, from the cache or newly built."""
    library = _library(compiler, number)
    if kept := _kept(library):
        return kept
    with _locked(library) as lock:
        if kept := _kept(library):  # another process has built it meanwhile
            return kept
        if failure := lock.read():  # not each in turn: a compiler that hangs does so for minutes
            raise OSError(failure)
        try:
            _build(compiler, number, library)
        except (OSError, subprocess.SubprocessError) as error:
            lock.write(_said(error))
            lock.flush()
            raise
    return ctypes.CDLL(str(library))


def _kept(library: Path) -> ctypes.CDLL | None:
    if not library.exists():
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # a machine that went down, or a full disk, leaves half a file
        log.info("%s can not be loaded and is built anew", library)
        return None


@contextmanager
def _locked(library: Path) -> Iterator[TextIO]:
    """One process builds while others wait: the ranks of a machine would run a compiler each, of hundreds of megabytes.
    On a file system without locks each builds. Yields the lock's file, in which those that waited find what the first
    one wrote.
    """
    path = library.with_suffix(".lock")
    with open(path, "a+", encoding="utf-8", errors="replace", opener=partial(os.open, mode=0o600)) as lock:
        try:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            yield lock
        finally:
            with suppress(OSError):  # processes that wait have it open
                path.unlink()


def _library(compiler: str, number: Number = "float") -> Path:
    """Returns the path of the library that this compiler makes of these sources for this processor."""
    sources = sorted([*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")])
    told = [
        compiler,
        *FLAGS,
        number,
        processor(),
        str(_openmp_in_use()),
        *(source.read_text(encoding="utf-8") for source in sources),
    ]
    return kernel_folder() / f"kernels-{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:24]}.so"


def _build(compiler: str, number: Number, library: Path) -> None:
    """Processes that build at once, on several machines or without locks, each put the same one there."""
    runtime = _openmp_in_use()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as scratch:
        part, made = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([compiler, *FLAGS, f"-DNUMBER={number}", "-c", str(SOURCE / "decoding.cpp"), "-o", str(part)])
        # Two runtimes would keep two sets of threads, each spinning on the other's cores: link torch's own.
        _run([compiler, "-shared", str(part), "-o", str(made), *([str(runtime)] if runtime else ["-fopenmp"])])
        made.replace(library)


def kernel_folder() -> Path:
    """Returns the folder of built kernels: `kernels` in the cache folder or, where others could write there, a folder
    that is removed at the end of the process.
    """
    folder = cache_folder() / "kernels"
    try:
        check_writable(folder)
    except OSError as error:
        log.warning(
            "%s can not be written (%s): the decoding kernels are built anew by each process; set %s to a folder that can",
            folder,
            error.strerror,
            VARIABLE,
        )
        return _own_folder()
    return folder if is_private(folder.resolve()) else _own_folder()


@cache
def _own_folder() -> Path:
    scratch = tempfile.TemporaryDirectory(prefix="ee_tuning-")
    _own_folders.append(scratch)
    return Path(scratch.name)


_own_folders: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that are removed when the process ends."""


def _openmp_in_use() -> Path | None:
    """Returns the OpenMP runtime that torch has loaded, if it is GNU's."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((Path(line.split(maxsplit=5)[5]) for line in mapped.split("\n") if "libgomp" in line), None)


def processor() -> str:
    """Returns the properties of the processor that -march=native depends on, because machines that differ may share a
    home.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def _run(command: list[str]) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=TIMEOUT, encoding="utf-8", errors="replace"
    )
