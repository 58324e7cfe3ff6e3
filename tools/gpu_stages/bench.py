"""Shared parts of the checks: the device, its measured limits, a folder, and calls in a process without a GPU."""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ee_tuning.config import ParallelSection
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "tiny-python-llama"
sys.path += [str(ROOT / "benchmarks")]


class Bench:
    """Device, folders and processes of one run of `gpu_check.py`."""

    def __init__(self, device: str, scratch: Path, results: Path, *, is_tiny: bool, is_inline: bool = False) -> None:
        """`scratch` is removed at the end, `results` stays. With `is_inline` no process is started, so that a test
        takes seconds.
        """
        self.device, self.scratch, self.results = torch.device(device), scratch, results
        self.is_tiny, self.is_inline = is_tiny, is_inline
        self._pool: ProcessPoolExecutor | None = None
        self._asked: dict[Any, Future[Any]] = {}
        self._num_folders = 0
        self.stages: Callable[..., list[Any]] | None = None
        """Calls a function on two existing stages, as tests have them, instead of two new processes."""

    @property
    def is_cuda(self) -> bool:
        """Whether the checks run on a GPU."""
        return self.device.type == "cuda"

    @property
    def topology(self) -> Topology:
        """The topology of this process alone."""
        return init_parallel(ParallelSection())

    @cached_property
    def bandwidth(self) -> float:
        """Bytes/s that a large copy reads and writes."""
        source = torch.empty(2**22 if self.is_tiny else 2**31, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * len(source) / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matrix_rate(self) -> float:
        """Operations/s of a large product of random bfloat16 matrices."""
        size = 128 if self.is_tiny else 8192
        one, other = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(one)
        return 2 * size**3 / self.seconds(lambda: torch.mm(one, other, out=out))

    def seconds(self, function: Callable[[], Any], repeats: int = 10) -> float:
        """Returns the median over `repeats` calls, after three that are not counted. Each call is waited for."""
        taken = []
        for _ in range(3 + (1 if self.is_tiny else repeats)):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[3:])

    def wait(self) -> None:
        """Waits until the device is idle."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def folder(self) -> Path:
        """Creates a new folder."""
        self._num_folders += 1
        made = self.scratch / str(self._num_folders)
        made.mkdir()
        return made

    def without_gpu(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls `function` of one of these modules with `arguments` in a process without a GPU, while this process
        continues. Equal calls are made once.
        """
        key = (function, *map(repr, arguments))
        if key not in self._asked:
            self._asked[key] = (
                self._inline(function, *arguments) if self.is_inline else self._submitted(function, *arguments)
            )
        return self._asked[key]

    def command(self, *arguments: object) -> str:
        """Runs `ee-tuning` and returns its output. Raises RuntimeError where its exit code is not 0."""
        words = [str(each) for each in arguments]
        if self.is_inline:
            return _in_process(words)
        done = subprocess.run(
            [sys.executable, "-m", "ee_tuning", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        if done.returncode:
            raise RuntimeError(f"ee-tuning {' '.join(words)} ended with {done.returncode}: {done.stderr[-4000:]}")
        return done.stdout

    def tidy(self) -> None:
        """Frees the memory of a check: modules refer to each other in cycles."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Ends all started processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():  # otherwise the interpreter waits for them at its end
                child.kill()
        if dist.is_initialized():
            destroy_parallel()

    def _submitted(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        with hidden_gpus():
            return self._pool.submit(in_own_world, function, *arguments)

    def _inline(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(in_own_world(function, *arguments))
        return future


def in_own_world(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, in a process that has joined no world before and after: an earlier call may have
    left it in one.
    """
    if dist.is_initialized():
        destroy_parallel()
    try:
        return function(*arguments)
    finally:
        if dist.is_initialized():
            destroy_parallel()


@contextmanager
def hidden_gpus() -> Iterator[None]:
    """Hides all GPUs from processes that are started within the block."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _in_process(words: list[str]) -> str:
    import io
    from contextlib import redirect_stdout

    from ee_tuning import cli

    with redirect_stdout(io.StringIO()) as said:
        if dist.is_initialized():
            destroy_parallel()
        code = cli.main(words)
    if code:
        raise RuntimeError(f"ee-tuning {' '.join(words)} ended with {code}")
    return said.getvalue()
