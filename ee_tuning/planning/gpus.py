"""Peak figures of GPUs from their makers' data sheets, for plans."""

import dataclasses
from dataclasses import dataclass

from ee_tuning.errors import InputError

GPUS_PER_NODE = 8
"""Default number of GPUs per node."""
RESERVED_GB = 2.0
"""Memory that each GPU needs for its context, NCCL's buffers and the allocator's losses."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and its connections. Decimal units: 1 GB is 10⁹ bytes."""

    name: str
    memory: float
    """GB."""
    tflops: float
    """10¹² bfloat16 operations per second in dense matrix products with float32 sums."""
    bandwidth: float
    """GB/s of its memory."""
    link: float
    """GB/s to other GPUs of its node, in one direction."""
    network: float
    """GB/s to other nodes, in one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA's data sheets of the SXM boards. NVLink is given there in both directions together (900 and 600 GB/s);
        # networks are those of DGX machines, one adapter per GPU: 400 Gbit/s with H100 and H200, 200 Gbit/s with A100.
        Gpu(name="h100", memory=80, tflops=989, bandwidth=3350, link=450, network=50),
        Gpu(name="h200", memory=141, tflops=989, bandwidth=4800, link=450, network=50),
        Gpu(name="a100", memory=80, tflops=312, bandwidth=2039, link=300, network=25),
        # Cards of 24 GB on PCIe 4 × 16, in a workstation with 10 Gbit/s and in a server with 25.
        Gpu(name="rtx4090", memory=24, tflops=165, bandwidth=1008, link=32, network=1.25),
        Gpu(name="l4", memory=24, tflops=121, bandwidth=300, link=32, network=3.125),
    )
}
"""GPUs by the names that `--gpu` takes."""


def gpu(name: str, **figures: float | None) -> Gpu:
    """Returns the GPU called `name`, with its figures replaced by those of `figures` (fields of Gpu) that are not None.

    Raises InputError on an unknown name, or a figure that is not above 0.
    """
    if name not in GPUS:
        raise InputError(
            f"--gpu must be one of {', '.join(GPUS)}, got {name}; for another give its --gpu-memory, --tflops, "
            "--bandwidth, --link and --network over one of these"
        )
    given = {field: value for field, value in figures.items() if value is not None}
    for field, value in given.items():
        if not 0 < value < float("inf"):
            raise InputError(f"the figure {field} of a GPU must be above 0, got {value}")
    return dataclasses.replace(GPUS[name], **given)  # type: ignore[arg-type]


def room(gpu: Gpu) -> float:
    """Returns the bytes of a GPU that a job can use."""
    return (gpu.memory - RESERVED_GB) * 1e9
