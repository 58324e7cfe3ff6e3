"""Process groups from Megatron's `parallel_state`, which is read here only. All other code gets the frozen Topology.

Ranks are ordered as Megatron orders them: tensor parallelism fastest, then data, then pipeline.
"""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.notices import warn
from ee_tuning.parallel.device import collective_backend, prepare_device
from ee_tuning.parallel.launcher import RendezvousError, check_address, launched_rank
from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.process_groups import Group, destroy_groups, destroy_world, one_group_for_same_ranks, own_group

_SHARES_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""`True` where torchrun says that the workers meet at its own store."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The position of this process and its groups. `control` groups use gloo and CPU tensors on every device."""

    world_size: int
    rank: int
    tp: int
    tp_rank: int
    pp: int
    stage: int
    dp: int
    dp_rank: int
    device: torch.device
    tp_group: Group
    """The shards of one layer. For collectives of tensors on `device`."""
    dp_group: Group
    """The replicas of this stage's shard."""
    pp_group: Group
    """The stages of one replica, first to last. For hidden states only."""
    stage_control: Group
    """gloo: all tensor- and data-parallel ranks of this stage."""
    feedback_group: Group
    """The stages of one replica. For tensors that the last stage sends back to earlier ones."""
    pp_control: Group
    """gloo: the stages of one replica. For small messages beside the hidden states."""
    replica_control: Group
    """gloo: all tensor- and pipeline-parallel ranks of one replica."""
    world_control: Group
    """gloo: all ranks."""
    save_control: Group
    """gloo: all ranks. For the threads that write checkpoints while training goes on."""
    pp_ranks: tuple[int, ...]
    """Global ranks of `pp_group`, by stage."""
    dp_mesh: Any
    """torch's DeviceMesh over `dp_group`, for `fully_shard`."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage embeds token ids."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage holds the final head."""
        return self.stage == self.pp - 1

    @property
    def is_logging_rank(self) -> bool:
        """Whether this process logs for all ranks."""
        return self.rank == 0

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the data that the replicas and shards of its stage have in common."""
        return self.tp_rank == 0 and self.dp_rank == 0

    @property
    def num_in_replica(self) -> int:
        """Number of ranks that together hold one copy of the model."""
        return self.tp * self.pp

    def first_rank_of_stage(self, stage: int) -> int:
        """Returns the global rank of a stage's first tensor-parallel rank in this replica."""
        return self.pp_ranks[stage] - self.tp_rank

    def writer_of_stage(self, stage: int) -> int:
        """Returns the global rank of a stage's `is_writer`."""
        return stage * self.tp * self.dp

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier(group=self.world_control)

    def broadcast_object(self, value: Any = None) -> Any:
        """Returns rank 0's `value` on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.world_control)
        return box[0]


def init_parallel(parallel: ParallelSection) -> Topology:
    """Joins the launcher's world (or a world of one process) and builds a TP × PP × DP topology on it.

    Raises InputError where TP × PP does not divide the world size.
    """
    check_world_size(parallel, world_size())
    if not 0.01 <= (minutes := parallel.distributed_timeout_minutes) <= 10080:
        raise InputError(
            f"parallel.distributed_timeout_minutes must lie between 0.01 and 10080, a week, got {minutes:g}; 30 is usual"
        )
    device = prepare_device()
    if not dist.is_initialized():
        _join_world(timedelta(minutes=parallel.distributed_timeout_minutes))
    topology = build_topology(parallel, device)
    if topology.is_logging_rank:
        for warning in filter(None, (connection_warning(topology), restart_warning())):
            warn(warning)
    return topology


def check_world_size(parallel: ParallelSection, world_size: int) -> None:
    """Raises InputError where TP × PP does not divide `world_size`."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, size in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if size < 1:
            raise InputError(f"parallel.{name} must be at least 1, got {size}")
    if world_size < 1 or world_size % (tp * pp):
        raise InputError(
            f"the number of processes must be a multiple of tensor × pipeline = {tp} × {pp} = {tp * pp}, got {world_size}; "
            f"launch with `torchrun --nproc-per-node {tp * pp} -m ee_tuning …`, or change parallel.*"
        )


def connection_warning(topology: Topology) -> str | None:
    """Returns a one-line warning about an inherited CUDA_DEVICE_MAX_CONNECTIONS that would slow this layout down, or
    None.
    """
    if topology.device.type != "cuda" or topology.pp == 1 or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        return None
    return (
        "CUDA_DEVICE_MAX_CONNECTIONS=1 puts all of a GPU's work in one queue, where a receive posted ahead holds up the layers behind "
        "it; unset it"
    )


def restart_warning() -> str | None:
    """Returns a one-line warning where torchrun is to restart workers on several nodes and could not readmit a node, or
    None.

    The first node publishes its store's address in the first round only (torch 2.13 and 2.14), so a torchrun that joins
    a later round waits for it in vain.
    """
    restarts, nodes = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if os.environ.get(_SHARES_STORE) != "True" or restarts == "0" or nodes == "1":
        return None
    return (
        f"torchrun restarts workers ({restarts} times) but can not take back a node that is lost; start it on every node with "
        "--rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    )


def destroy_parallel() -> None:
    """Destroys the process groups, so that the interpreter exits without a warning."""
    with importing_megatron():
        from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    destroy_world()


def world_size() -> int:
    """Returns the size of the joined world, or of the one that the launcher described.

    Raises InputError where the launcher's variables contradict each other.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    place = launched_rank()
    return place.world_size if place else 1


def _join_world(timeout: timedelta) -> None:
    place = launched_rank()
    if place is None or place.world_size == 1:  # a single process needs no address
        dist.init_process_group(collective_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    check_address(place)
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        dist.init_process_group(
            collective_backend(), store=store_of_this_attempt(store), rank=rank, world_size=world_size, timeout=timeout
        )
    except dist.DistError as error:  # nothing listens there, another program has the port, or a process is missing
        reason, _, _ = str(error).partition("\n")
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RendezvousError(
            f"{place.world_size} processes must meet at {where} (MASTER_ADDR, MASTER_PORT), and rank {place.rank} could not: "
            f"{reason[:300]}; see that all were started, and that the port is free"
        ) from error


def store_of_this_attempt(store: dist.Store) -> dist.Store:
    """Separates the attempts that share torchrun's store, which outlives its workers: restarted ones would read the
    addresses of former ones.

    A store that the workers make themselves is new with each attempt. It must have no prefix: each torchrun counts its
    own restarts, and one that takes the place of a dead one begins at 0.
    """
    if os.environ.get(_SHARES_STORE) != "True":
        return store
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def build_topology(parallel: ParallelSection, device: torch.device) -> Topology:
    """Builds TP × PP × DP on the joined world, whose size they must divide. All ranks call it."""
    with importing_megatron():
        from megatron.core import parallel_state
    if parallel_state.model_parallel_is_initialized():  # another layout of the same world exists
        destroy_groups()
        parallel_state.destroy_model_parallel()
        # models refer to their groups and to themselves in cycles: while they live, the groups' threads do, too
        gc.collect()
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dp = world_size // (tp * pp)
    with one_group_for_same_ranks(
        parallel_state, kept=[[(p * dp + d) * tp + t for d in range(dp)] for p in range(pp) for t in range(tp)]
    ):
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            create_gloo_process_groups=False,  # not used here
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
    stage, column = rank // (tp * dp), rank % (tp * dp)
    stages = [list(range(p * tp * dp, (p + 1) * tp * dp)) for p in range(pp)]
    columns = [[p * tp * dp + i for p in range(pp)] for i in range(tp * dp)]
    replicas = [[rank for p in range(pp) for rank in stages[p][d * tp : (d + 1) * tp]] for d in range(dp)]
    everybody = [list(range(world_size))]
    make = partial(own_group, rank=rank, timeout=timedelta(minutes=parallel.distributed_timeout_minutes))
    return Topology(
        world_size=world_size,
        rank=rank,
        device=device,
        tp=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=pp,
        stage=stage,
        dp=dp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        stage_control=make(stages),
        feedback_group=make(columns, backend=dist.get_backend()),
        pp_control=make(columns),
        replica_control=make(replicas),
        world_control=make(everybody),
        save_control=make(everybody),
        pp_ranks=tuple(columns[column]),
        dp_mesh=DeviceMesh.from_group(parallel_state.get_data_parallel_group(), device.type),
    )
