"""Parameters of which several pipeline stages hold a copy: the model's own norm and output matrix, where exits on
earlier stages apply them, and an embedding that is the output matrix, too. Their gradients are summed over these
stages, as Megatron does for tied embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ee_tuning.parallel.process_groups import Group, own_group
from ee_tuning.parallel.topology import Topology


@dataclass(frozen=True)
class StageCopies:
    """The stages that hold copies of a parameter."""

    index: int
    """This stage's place among those that hold one; 0 writes it."""
    group: Group
    """The ranks that hold the same part of it, one of each of these stages."""


def find_stage_copies(
    holders: Mapping[str, tuple[int, ...]], topology: Topology, *, minutes: float
) -> dict[str, StageCopies]:
    """Returns those parameters of which this stage and others hold copies. All ranks call it.

    `holders`, the same on all ranks, are the stages of each parameter that may have several, increasing. `minutes` is
    the timeout of a sum.
    """
    shared = sorted({stages for stages in holders.values() if len(stages) > 1})
    groups = {stages: _group(stages, topology, minutes) for stages in shared}
    return {
        name: StageCopies(stages.index(topology.stage), groups[stages])
        for name, stages in holders.items()
        if stages in groups and topology.stage in stages
    }


def _group(stages: tuple[int, ...], topology: Topology, minutes: float) -> Group:
    """Returns the group of this rank's place in `stages`, or, on another stage, in all the others."""
    per_stage = topology.tp * topology.dp
    others = [stage for stage in range(topology.pp) if stage not in stages]
    partition = [
        [stage * per_stage + place for stage in part] for place in range(per_stage) for part in (stages, others) if part
    ]
    return own_group(partition, rank=topology.rank, timeout=timedelta(minutes=minutes), backend=dist.get_backend())
