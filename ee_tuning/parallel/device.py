"""Devices and backends of this process, and the patches that let Megatron-core run without CUDA.

The patches are applied once, before a model is built, and only where CUDA is absent. No other file depends on them.
"""

import functools
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ee_tuning.parallel.launcher import local_rank, local_world_size


def device() -> torch.device:
    """Returns this process's own GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def collective_backend() -> str:
    """Returns the backend for tensors on `device()`: gloo where several processes share a GPU, which NCCL refuses."""
    has_own_gpu = torch.cuda.is_available() and local_world_size() <= torch.cuda.device_count()
    return "nccl" if has_own_gpu else "gloo"


def control_backend() -> str:
    """Returns the backend for small CPU tensors: gloo, or the fake one inside a fake world (`fake_world.py`)."""
    return "fake" if dist.get_backend() == "fake" else "gloo"


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor multiplies matrices in bfloat16. Assumed where torch does not report it."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("architecture") != "x86_64" or bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns zeros whose memory, on a CPU, is taken page by page when it is first written to.

    torch.zeros writes all of it at once: seconds for a cache of gigabytes, most of which is never used. Raises
    RuntimeError or OSError where there is no room for so much.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    numbers = math.prod(shape)
    pages = mmap.mmap(-1, max(1, numbers * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=numbers).view(shape)


@functools.cache
def prepare_device() -> torch.device:
    """Makes this process's device current. Without CUDA, patches torch so that Megatron-core runs on the CPU."""
    this = device()
    if this.type == "cuda":
        torch.cuda.set_device(this)
        return this
    with torch.device(
        "meta"
        # torch notes, when it first enters such a context, which functions to intercept; they must be the original ones
    ):
        torch.empty(0)
    # Megatron-core calls these three when it allocates, and assumes CUDA.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None
    for name in ("zeros", "empty", "tensor"):
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    return this


def _cuda_means_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped
