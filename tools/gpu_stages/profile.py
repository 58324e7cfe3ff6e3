"""Kernels and the gaps between them, by torch's profiler."""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

from gpu_stages.bench import Bench


def steps_profiled(function: Callable[[], Any], bench: Bench, num_steps: int) -> dict[str, Any]:
    """Profiles `function`, which takes `num_steps` steps: time by kernel, the share of time in which the device is
    idle, and the longest gaps, in microseconds.
    """
    activities = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if bench.is_cuda else []
    )
    with torch.profiler.profile(activities=activities) as profile:
        function()
        bench.wait()
    kind = DeviceType.CUDA if bench.is_cuda else DeviceType.CPU
    return of_spans(
        [
            (each.time_range.start, each.time_range.end, each.name)
            for each in profile.events() or []
            if each.device_type == kind
        ],
        num_steps,
    )


def of_spans(spans: list[tuple[float, float, str]], num_steps: int) -> dict[str, Any]:
    """Returns the profile of kernels' (begin, end, name) in microseconds."""
    spans = sorted(spans)
    by_name: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    gaps: list[tuple[float, str, str]] = []
    busy, until, last = 0.0, float(spans[0][0]) if spans else 0.0, ""
    for begin, end, name in spans:
        by_name[name] += end - begin
        calls[name] += 1
        if begin > until:
            gaps.append((begin - until, last, name))
        busy += max(end - max(begin, until), 0.0)
        until, last = (end, name) if end > until else (until, last)
    total = max(until - spans[0][0], 1e-9) if spans else 1e-9
    return {
        "microseconds_per_step": total / num_steps,
        "idle_share": 1 - busy / total,
        "kernels_per_step": len(spans) / num_steps,
        "kernels": [
            {
                "name": name,
                "share": time / total,
                "microseconds_per_step": time / num_steps,
                "calls_per_step": calls[name] / num_steps,
            }
            for name, time in sorted(by_name.items(), key=lambda item: -item[1])[:40]
        ],
        "gaps": [
            {"microseconds": gap, "after": after, "before": before}
            for gap, after, before in sorted(gaps, reverse=True)[:40]
        ],
    }
