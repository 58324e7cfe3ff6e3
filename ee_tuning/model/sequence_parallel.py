"""Megatron's sequence parallelism (arXiv 2205.05198): hidden states cut along the sequence over tensor-parallel ranks.

Between a row-parallel and the next column-parallel map each rank holds a part of the tokens. Elsewhere ranks hold all
of them.
"""

# s sequence · tp tensor-parallel ranks
import warnings

from torch import Tensor

from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.topology import Group, Topology

with importing_megatron():
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )

# Megatron-core calls functions that torch has renamed, in every layer.
warnings.filterwarnings(
    "ignore", message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
)


def local_sequence(x: Tensor, topology: Topology) -> Tensor:  # [s, …] -> [s/tp, …], a view
    """Returns this rank's tokens."""
    size = x.shape[0] // topology.tp
    return x.narrow(0, topology.tp_rank * size, size)


def scatter_sequence(x: Tensor, group: Group) -> Tensor:  # [s, …] -> [s/tp, …]
    """Returns this rank's tokens. In the backward pass, all ranks get the gradient of all tokens."""
    return scatter_to_sequence_parallel_region(x, group=group)


def gather_sequence(part: Tensor, group: Group) -> Tensor:  # [s/tp, …] -> [s, …]
    """Gathers all ranks' tokens. In the backward pass, the ranks' gradients are summed, and each rank gets its tokens'
    part.
    """
    return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)


def reduce_scatter_sequence(partial: Tensor, group: Group) -> Tensor:  # [s, …] -> [s/tp, …]
    """Sums the ranks' shares and returns this rank's tokens of the sum."""
    return reduce_scatter_to_sequence_parallel_region(partial, group=group)
