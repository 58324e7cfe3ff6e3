"""What a machine without CUDA needs before Megatron-core runs on it. Nothing else in the package knows.

Applied only where CUDA is absent, once, before a model is built.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ee_tuning.parallel.launcher import local_rank, local_world_size


def device() -> torch.device:
    """This process's device: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def collective_backend() -> str:
    """The process-group backend of tensors on `device()`. NCCL refuses several processes on one GPU, so they talk over
    gloo.
    """
    has_own_gpu = torch.cuda.is_available() and local_world_size() <= torch.cuda.device_count()
    return "nccl" if has_own_gpu else "gloo"


def control_backend() -> str:
    """The process-group backend of small CPU tensors: gloo, or none at all in a world that is imagined
    (`fake_world.py`).
    """
    return "fake" if dist.get_backend() == "fake" else "gloo"


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for matrix products in bfloat16. Where it is not known, it
    has.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("architecture") != "x86_64" or bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )


@functools.cache
def prepare_device() -> torch.device:
    """Makes this process's device current and, without CUDA, lets Megatron-core build and run on the CPU."""
    this = device()
    if this.type == "cuda":
        torch.cuda.set_device(this)
        return this
    with torch.device(
        "meta"
    ):  # torch notes, at the first use, which functions such a context steers: they must still be its own
        torch.empty(0)
    # Megatron-core asks for these three wherever it allocates, with no CPU in mind.
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
