"""Layouts, tensor × pipeline × data, of a job on a cluster: each one is planned, and the fastest that fits is
chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ee_tuning.artifact.shapes import shape_sources
from ee_tuning.checkpoint.model_size import parameters_by_part
from ee_tuning.config import Config, replace
from ee_tuning.errors import InputError
from ee_tuning.planning.gpus import room
from ee_tuning.planning.plan import Cluster, TuningPlan, make_plan

_BYTES = {"native": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes of a frozen parameter, at least."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of a job on a cluster."""

    tensor: int
    pipeline: int
    data: int
    plan: TuningPlan | None
    """None where the job has no such layout, or obviously does not fit."""
    refusal: str = ""
    """Reason why there is no plan."""

    @property
    def fits(self) -> bool:
        """Whether the job can run in it."""
        return self.plan is not None and self.plan.fits


def layouts(
    config: Config,
    cluster: Cluster,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    on_layout: Callable[[Layout], None] = lambda layout: None,
) -> list[Layout]:
    """Returns all layouts of the cluster's GPUs, those that fit first, ordered by their hours; only those with the
    sizes `tensor` and `pipeline`, where given.

    Tensor parallelism stays within a node: across nodes its messages, two a layer, would take longer than the layers.
    `on_layout` is called after each layout. Raises InputError where the job can not be planned at all.
    """
    for size, name in ((tensor, "tensor"), (pipeline, "pipeline")):
        if size is not None and size < 1:
            raise InputError(f"parallel.{name}_model_parallel_size must be at least 1, got {size}")
    sources = shape_sources(config)
    model, parts = sources.config, parameters_by_part(sources.config)
    depth = max(sources.exits.exit_layers, default=0) / model.num_layers if sources.exits else 0.0
    in_layers = parts["all"] - parts["embedding"] - parts["output"]
    # Layers after the last exit may be left out.
    least = _BYTES.get(config.tuning.backbone_weights, 0.5) * depth * in_layers
    found = []
    for tp in _divisors(cluster.gpus_per_node) if tensor is None else [tensor]:
        for pp in _divisors(cluster.world_size // tp, model.num_layers) if pipeline is None else [pipeline]:
            if tp * pp > cluster.world_size or pp > model.num_layers:
                continue
            found.append(_planned(config, cluster, tp, pp, least))
            on_layout(found[-1])
    if not found:
        raise InputError(
            f"no layout of {cluster.world_size} GPUs has tensor × pipeline = {tensor or 'any'} × {pipeline or 'any'}, with at most "
            f"{model.num_layers} stages, one per layer; give other sizes, or none"
        )
    if not any(each.plan for each in found):
        raise InputError(
            f"no layout of {cluster.world_size} GPUs suits this job; the first, because {found[0].refusal}"
        )
    return sorted(found, key=lambda each: (not each.fits, each.plan is None, each.plan.hours if each.plan else 0))


def _planned(config: Config, cluster: Cluster, tp: int, pp: int, least: float) -> Layout:
    sizes: dict[str, Any] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    if pp != config.parallel.pipeline_model_parallel_size:
        sizes["pipeline_layout"] = ()  # the job's own layout, for another number of stages
    data = cluster.world_size // (tp * pp)
    if least / (tp * pp) > room(cluster.gpu):
        refusal = (
            f"frozen layers alone take {least / (tp * pp) / 1e9:.0f} GB of each GPU's {room(cluster.gpu) / 1e9:.0f}"
        )
        return Layout(tensor=tp, pipeline=pp, data=data, plan=None, refusal=refusal)
    tuning = config.tuning
    if tuning.micro_batch_size > 0 and tuning.global_batch_size % (tuning.micro_batch_size * data):
        refusal = f"{data} replicas have no equal shares of a global batch of {tuning.global_batch_size}, {tuning.micro_batch_size} at a time"
        return Layout(tensor=tp, pipeline=pp, data=data, plan=None, refusal=refusal)
    try:
        plan = make_plan(replace(config, parallel=sizes), cluster)
    except InputError as error:
        return Layout(tensor=tp, pipeline=pp, data=data, plan=None, refusal=str(error))
    return Layout(tensor=tp, pipeline=pp, data=data, plan=plan)


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [each for each in range(1, min(number, most or number) + 1) if number % each == 0]
