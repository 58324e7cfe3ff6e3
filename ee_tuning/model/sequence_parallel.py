"""Hidden states cut along the sequence over tensor parallelism, Megatron's sequence parallelism (arXiv 2205.05198): by
its own mappings.

Between a row-parallel and the next column-parallel map each rank has a part of the tokens; what follows is on all of
them.
"""

# s sequence · tp tensor-parallel ranks
import warnings

from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from ee_tuning.parallel.topology import Group, Topology

# Megatron-core calls what torch has renamed, in every layer.
warnings.filterwarnings(
    "ignore", message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
)


def local_sequence(x: Tensor, topology: Topology) -> Tensor:  # [s, …] -> [s/tp, …], a view
    """This rank's tokens."""
    size = x.shape[0] // topology.tp
    return x.narrow(0, topology.tp_rank * size, size)


def gather_sequence(part: Tensor, group: Group) -> Tensor:  # [s/tp, …] -> [s, …]
    """All ranks' tokens. Each rank's gradient is taken for a share of the whole: they are summed, and each gets its own
    tokens' part.
    """
    return gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)


def reduce_scatter_sequence(partial: Tensor, group: Group) -> Tensor:  # [s, …] -> [s/tp, …]
    """This rank's tokens of the sum of the ranks' shares."""
    return reduce_scatter_to_sequence_parallel_region(partial, group=group)
