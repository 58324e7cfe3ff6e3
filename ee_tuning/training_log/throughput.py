"""The throughput of a run, and the share of its time that a stage waits for others."""

import resource
import sys
import time
from collections.abc import Callable

import torch


class Throughput:
    """Seconds and steps of training since the last report. Validations and checkpoints do not count."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, seconds_waited: Callable[[], float]) -> None:
        """`seconds_waited` returns the seconds that this stage has waited for others since the run began."""
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._seconds_waited = seconds_waited
        self._num_steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._at = (time.perf_counter(), seconds_waited())

    def mark(self, *, trained: bool) -> None:
        """Ends a time span, which counts as training or not."""
        former, self._at = self._at, (time.perf_counter(), self._seconds_waited())
        if trained:
            self._seconds += self._at[0] - former[0]
            self._waited += self._at[1] - former[1]

    def count_step(self) -> None:
        """Counts an optimizer step."""
        self._num_steps += 1

    def report(self) -> dict[str, float]:
        """Returns the figures since the last report.

        These are tokens per second, FLOP/s of the whole model (multiplications and additions of matrix products), the
        share of time that this stage waited for others, and this process's peak memory in bytes since it began.
        """
        tokens_per_second = self._num_steps * self._tokens_per_step / max(self._seconds, 1e-9)
        idle_share = self._waited / max(self._seconds, 1e-9)
        self._num_steps, self._seconds, self._waited = 0, 0.0, 0.0
        return {
            "tokens_per_second": tokens_per_second,
            "flops_per_second": tokens_per_second * self._flops_per_token,
            "idle_share": idle_share,
            "memory_bytes": _peak_bytes(),
        }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
