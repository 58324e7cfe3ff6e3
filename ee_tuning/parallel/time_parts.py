"""Time of a process by part, such as attention or waiting, during a measurement.

Functions are marked with `@part(NAME)`. A part's seconds are its own, without those of parts within it. On a GPU each
part waits for its kernels, so that their time is counted for that part; this makes a measured run slower.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

REST = "Python and the rest"
COMMUNICATION = "communication"
TRACED = range(3, 8)
"""Steps whose calls are kept one by one: the first ones of a process allocate and compile."""
_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
"""Functions of torch.distributed whose time is communication. Messages between stages are counted as waiting."""


@dataclass
class TimeParts:
    """Seconds and calls by part, of the thread that began the measurement."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    """Optimizer steps or decoding steps."""
    events: list[tuple[str, int, int]] = field(default_factory=list)
    """Part, begin and end in nanoseconds since the epoch, of calls in the traced steps."""
    _open: list[str] = field(default_factory=lambda: [REST])
    _since: float = field(default_factory=time.perf_counter)
    _thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._book()
        self._open.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        began = time.time_ns()
        try:
            yield
        finally:
            self._book()
            self._open.pop()
            if self.steps + 1 in TRACED:
                self.events.append((name, began, time.time_ns()))

    def end(self) -> None:
        """Counts the time until now."""
        self._book()

    def _book(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, name = time.perf_counter(), self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_measured: TimeParts | None = None
"""The current measurement of this process, if any."""


def part(name: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Marks a function as a part. Without a measurement a call costs one more comparison."""

    def mark(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def marked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if _measured is None:
                return function(*args, **kwargs)
            with _measured.measure(name):
                return function(*args, **kwargs)

        return marked

    return mark


def count_step() -> None:
    """Counts a step of the measured run."""
    if _measured is not None:
        _measured.steps += 1


@contextmanager
def measured_parts(modules: dict[str, list[nn.Module]]) -> Iterator[TimeParts]:
    """Measures the block. `modules` are modules of other libraries, by the name of their part."""
    global _measured
    assert _measured is None, "two measurements at once"
    with ExitStack() as patches:
        for name, marked in modules.items():
            for module in marked:
                patches.callback(delattr, module, "forward")
                module.forward = part(name)(module.forward)
        for function in _COLLECTIVES:
            patches.callback(setattr, dist, function, getattr(dist, function))
            setattr(dist, function, part(COMMUNICATION)(getattr(dist, function)))
        _measured = TimeParts()
        try:
            yield _measured
        finally:
            _measured.end()
            _measured = None
