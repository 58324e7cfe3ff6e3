"""Costs of a tuning job: bytes per rank, time, GPU-hours. Computed from a dry run and the figures of a GPU.

Memory is measured, not modelled: it is that of the real code's tensors (`dry_run.py`). Time is a formula of counted
operations and bytes, FORMULA, with one assumption: the share of its peak that a GPU reaches.
"""

from dataclasses import dataclass

from ee_tuning.artifact.shapes import with_seq_length
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import check_world_size
from ee_tuning.planning.dry_fit import FitProfile, profile_fit
from ee_tuning.planning.dry_run import MEMORY, RankProfile, profile_ranks
from ee_tuning.planning.gpus import GPUS_PER_NODE, Gpu, room

EFFICIENCY = 0.5
"""Default share of its peak rate that a GPU is assumed to reach."""
MOST_TRIED = 100_000
"""Most nodes, GPUs per node and replicas that are planned: their divisors are tried one by one."""

FORMULA = (
    "micro-batch of stage p = (layers' + heads' operations) ÷ (efficiency × peak operations/s) + (t − 1)/t × bytes gathered and reduced "
    "over tensor parallelism t (both, where all-reduced) ÷ bandwidth between its GPUs; no less than bytes sent to the next stage ÷ "
    "bandwidth between them",
    "step = micro-batches × the slowest stage's micro-batch + the slowest update; where the model is trained, stages − 1 more "
    "micro-batches, for the pipeline fills and drains in each step",
    "update of stage p = 2 × (bytes of masters and moments) ÷ memory bandwidth + (d − 1)/d × bytes of weights gathered "
    "and gradients reduced "
    "over d replicas ÷ bandwidth between them",
    "run = steps × step + validations × eval_iters × the slowest stage's forward + (stages − 1) × the slowest "
    "stage's micro-batch, or chunk of it, for the "
    "relay fills once; checkpoints, loading and data are left out; where exits are fitted, + the fit's micro-batches "
    "× the slowest stage's "
    "operations ÷ (efficiency × peak operations/s)",
)
"""The formula of the times."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a plan."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    efficiency: float
    """Share of the peak rate that matrix products and the operations between them reach."""

    @property
    def world_size(self) -> int:
        """Number of GPUs, and of processes."""
        return self.nodes * self.gpus_per_node

    def bandwidth(self, span: int) -> float:
        """Returns the bytes/s, in one direction, of a GPU among `span` neighbouring ranks."""
        within = self.nodes == 1 or (span <= self.gpus_per_node and self.gpus_per_node % span == 0)
        return 1e9 * (self.gpu.link if within else self.gpu.network)


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """A kind of stage. Times are in seconds."""

    stages: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    """First and last layer of each of them."""
    exits: tuple[tuple[int, ...], ...]
    """Exits of each of them."""
    memory: dict[str, int]
    """Peak bytes on each of its ranks, by the keys of MEMORY."""
    total_bytes: int
    fits: bool
    micro_batch: float
    """Seconds of a training micro-batch."""
    validation: float
    """Seconds of a validation micro-batch."""
    message_share: float
    """Share of a training micro-batch that goes to messages of tensor parallelism."""
    update: float
    idle_share: float
    """Share of the time of micro-batches in which this stage waits for slower ones."""


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """The costs of a job on a cluster."""

    cluster: Cluster
    tensor: int
    pipeline: int
    data: int
    stages: tuple[StageFigures, ...]
    fits: bool
    seq_length: int
    """Tokens per sequence."""
    chunk_length: int
    """Tokens of each sequence that go through the layers at a time."""
    step_seconds: float
    tokens_per_second: float
    tokens: int
    hours: float
    gpu_hours: float
    fit_bytes: int
    """Peak bytes on a rank during a fit before the first step; 0 without a fit."""
    fit_seconds: float
    efficiency_of_run: float
    """Share of the GPUs' peak rate that all counted operations reach in a step, waiting and messages included."""


def smallest_plan(config: Config, gpu: Gpu, efficiency: float) -> TuningPlan:
    """Returns the plan with the fewest GPUs that can hold the job, in nodes of GPUS_PER_NODE.

    That is one replica, or more where its optimizer must be shared. If none fits, returns the largest plan tried.
    Raises InputError like `make_plan`.
    """
    tuning, parallel = config.tuning, config.parallel
    in_replica = max(1, parallel.tensor_model_parallel_size) * max(1, parallel.pipeline_model_parallel_size)
    plan: TuningPlan | None = None
    for num_replicas in _replica_counts(tuning.global_batch_size // max(1, tuning.micro_batch_size)):
        world_size = in_replica * num_replicas
        per_node = min(world_size, GPUS_PER_NODE)
        if world_size % per_node:
            continue
        plan = make_plan(
            config, Cluster(gpu=gpu, nodes=world_size // per_node, gpus_per_node=per_node, efficiency=efficiency)
        )
        # More replicas share the optimizer's state, and nothing else.
        if plan.fits or any(each.total_bytes - each.memory["optimizer"] > room(gpu) for each in plan.stages):
            return plan
    if plan is None:
        raise InputError(
            f"tensor × pipeline = {in_replica} processes do not fill nodes of {GPUS_PER_NODE} GPUs evenly; describe "
            "the cluster by --nodes and --gpus-per-node"
        )
    return plan


def _replica_counts(num_microbatches: int) -> list[int]:
    """Returns the numbers of replicas that divide a step's micro-batches, fewest first."""
    return [count for count in range(1, min(max(1, num_microbatches), MOST_TRIED) + 1) if num_microbatches % count == 0]


def make_plan(config: Config, cluster: Cluster) -> TuningPlan:
    """Returns the plan of the job in `config`. Raises InputError like a dry run, and on an invalid cluster."""
    config = with_seq_length(config)
    for name, value in (("nodes", cluster.nodes), ("gpus-per-node", cluster.gpus_per_node)):
        if not 1 <= value <= MOST_TRIED:
            raise InputError(f"--{name} must be at least 1 and at most {MOST_TRIED}, got {value}")
    if not 0 < cluster.efficiency <= 1:
        raise InputError(f"--efficiency is a share of the peak rate, above 0 and at most 1, got {cluster.efficiency}")
    tuning, parallel, world = config.tuning, config.parallel, cluster.world_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    _check_batch(config, world)
    profiles, fit = profile_ranks(config, world), profile_fit(config, world)
    dp = world // (tp * pp)
    slowest = max(_micro_batch(each, cluster, tp, trains=True) for each in profiles)
    stages = tuple(_figures(each, cluster, tp, dp, slowest) for each in profiles)
    count = tuning.global_batch_size // (tuning.micro_batch_size * dp)
    fills = pp - 1  # micro-batches while the pipeline fills and drains: once a step where gradients come back
    drains = tuning.trained.has_backbone
    step = (count + fills * drains) * slowest + max(each.update for each in stages)
    tokens_per_step = tuning.global_batch_size * tuning.seq_length
    validations = 2 + (tuning.train_iters - 1) // tuning.eval_interval if tuning.eval_interval else 2
    run = (
        tuning.train_iters * step
        + validations * tuning.eval_iters * max(each.validation for each in stages)
        + fills * (not drains) * slowest * tuning.pass_length / tuning.seq_length
    )
    fit_bytes, fit_seconds = max((each.num_bytes for each in fit), default=0), _fit_seconds(fit, cluster)
    run += fit_seconds
    flops = count * dp * tp * sum((each.layer_flops + each.head_flops) * len(each.stages) for each in profiles)
    return TuningPlan(
        cluster=cluster,
        tensor=tp,
        pipeline=pp,
        data=dp,
        stages=stages,
        fits=all(each.fits for each in stages) and fit_bytes <= room(cluster.gpu),
        fit_bytes=fit_bytes,
        fit_seconds=fit_seconds,
        seq_length=tuning.seq_length,
        chunk_length=tuning.pass_length,
        step_seconds=step,
        tokens_per_second=tokens_per_step / step,
        tokens=tuning.train_iters * tokens_per_step,
        hours=run / 3600,
        gpu_hours=run / 3600 * world,
        efficiency_of_run=flops / (step * world * cluster.gpu.tflops * 1e12),
    )


def _check_batch(config: Config, world_size: int) -> None:
    """Raises InputError where the number of replicas does not divide a step's micro-batches."""
    tuning, parallel = config.tuning, config.parallel
    check_world_size(parallel, world_size)
    dp = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    if (
        tuning.micro_batch_size > 0
        and tuning.global_batch_size > 0
        and tuning.global_batch_size % (tuning.micro_batch_size * dp)
    ):
        raise InputError(
            f"tuning.global_batch_size must be a multiple of micro_batch_size × replicas = {tuning.micro_batch_size} × {dp}"
            f"{f', as {world_size} GPUs make {dp} replicas' if dp > 1 else ''}, got {tuning.global_batch_size}; change one of them"
            f"{', give other --nodes and --gpus-per-node, or leave both out, for the fewest GPUs that fit' if dp > 1 else ''}"
        )


def _figures(each: RankProfile, cluster: Cluster, tp: int, dp: int, slowest: float) -> StageFigures:
    own, total = _micro_batch(each, cluster, tp, trains=True), sum(each.memory.values())
    replicas = (dp - 1) / dp * each.dp_bytes / cluster.bandwidth(tp * dp)
    assert set(each.memory) == set(MEMORY)
    return StageFigures(
        stages=each.stages,
        layers=each.layers,
        exits=each.exits,
        memory=each.memory,
        total_bytes=total,
        fits=total <= room(cluster.gpu),
        micro_batch=own,
        validation=_micro_batch(each, cluster, tp, trains=False),
        message_share=_tensor_messages(each, cluster, tp) / own,
        update=2 * each.memory["optimizer"] / (cluster.gpu.bandwidth * 1e9) + replicas,
        idle_share=1 - own / slowest,
    )


def _fit_seconds(fit: list[FitProfile], cluster: Cluster) -> float:
    return max((each.num_micro_batches * each.flops for each in fit), default=0) / (
        cluster.efficiency * cluster.gpu.tflops * 1e12
    )


def _micro_batch(each: RankProfile, cluster: Cluster, tp: int, *, trains: bool) -> float:
    flops = each.layer_flops + (each.head_flops if trains else each.validation_flops)
    computing = flops / (cluster.efficiency * cluster.gpu.tflops * 1e12)
    return max(computing + _tensor_messages(each, cluster, tp), each.pp_bytes / cluster.bandwidth(cluster.world_size))


def _tensor_messages(each: RankProfile, cluster: Cluster, tp: int) -> float:
    """Returns the seconds of a micro-batch's messages between the shards of its layers."""
    return (tp - 1) / tp * each.tp_bytes / cluster.bandwidth(tp)
