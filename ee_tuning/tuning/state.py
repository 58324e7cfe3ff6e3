"""The content of a run's checkpoint: master weights, Adam's moments and update counts of every exit, and of the model
where it is trained, and the progress.

`checkpoints/step_00000100/` is in Megatron-core's distributed format, with tensors under Hugging Face's names, beside
`progress.json` and a sha256 manifest. Every rank writes and reads only its own rectangles of those tensors, so a run
resumes under any TP × PP × DP.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ee_tuning.artifact.exit_names import exit_shard, is_replicated
from ee_tuning.checkpoint.names import merge_shards
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.manifest import check_file, read_manifest
from ee_tuning.storage.metadata_pickle import check_metadata_pickle
from ee_tuning.storage.tensor_slice import Shard
from ee_tuning.tuning.backbone_optimizer import BackboneOptimizer, TrainedRows
from ee_tuning.tuning.optimizer import ExitOptimizer

with importing_megatron():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

CHECKPOINTS, LATEST, PROGRESS = "checkpoints", "latest", "progress.json"
_BACKBONE_COUNT = "backbone.num_updates"
_REMEDY = "write the name of another folder of checkpoints/ into checkpoints/latest, or start a new run"


@dataclass(frozen=True)
class Trained:
    """The trained parts of this stage."""

    exits: list[ExitOptimizer]
    backbone: BackboneOptimizer | None
    """None where the model is frozen."""


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """The progress of a run, and the facts that must not change when it resumes."""

    step: int
    """Number of optimizer steps taken."""
    position: int
    """Number of samples consumed by all replicas."""
    validated_step: int | None
    """The step that the last validation followed; None before the first."""
    fixed: dict[str, Any]
    """Facts about the exits and the order of the data. A resumed run must have the same."""


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Returns the folder that `latest` names, or None without a checkpoint. Raises InputError where it names none."""
    pointer = run_folder / CHECKPOINTS / LATEST
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    folder = pointer.parent / name
    if Path(name).name != name or not folder.is_dir():
        raise InputError(f"{pointer} must name a folder beside it, got {name!r}; {_REMEDY}")
    return folder


def load_checkpoint(
    folder: Path, fixed: dict[str, Any], trained: Trained, config: ModelConfig, topology: Topology
) -> TrainingProgress:
    """Loads a checkpoint into the master weights and optimizers. All ranks call it.

    Raises InputError where a file is missing or altered, or the checkpoint's facts differ from `fixed`.
    """

    def checked() -> TrainingProgress:
        for name, entry in read_manifest(folder, _REMEDY).items():
            check_file(folder / name, entry, _REMEDY)
        check_metadata_pickle(folder)
        return _read_progress(folder, fixed)

    progress = on_first_rank(topology, checked)
    state = own_state(trained, config, topology)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Megatron-core calls functions that torch has renamed
        loaded = dist_checkpointing.load(dict(state), str(folder))
    with torch.no_grad():
        for key, target in _tensors(trained, config, topology).items():
            target.data.copy_(loaded[key])
    for each in trained.exits:
        for parameter in each.parameters.values():
            each.adam.state[parameter]["step"].copy_(loaded[_count_key(each.layer)].squeeze(0))
    if trained.backbone is not None:
        trained.backbone.restore(loaded[_BACKBONE_COUNT])
    return progress


def whole_tensors(exits: list[ExitOptimizer], config: ModelConfig, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """Yields the artifact's tensors from the master weights, as name and whole tensor, on the writer of each stage.

    All ranks of a stage iterate together: parameters are gathered over replicas and shards, one at a time.
    """
    for each in exits:
        for name, parameter in each.parameters.items():
            shard = _as_sharded(parameter.detach()).full_tensor()
            plans = [exit_shard(each.head.spec, name, config, topology.tp, rank) for rank in range(topology.tp)]
            yield from _merged(plans, shard, topology)


def whole_backbone_tensors(backbone: BackboneOptimizer, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """Does for the model's trained tensors, or LoRA's, what `whole_tensors` does for exits."""
    for plan, shard in backbone.whole_masters():
        yield from _merged([plan(rank) for rank in range(topology.tp)], shard, topology)


def _merged(plans: list[Shard], shard: Tensor, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    shard = shard.contiguous()
    shards = [shard]
    if topology.tp > 1:
        shards = [torch.empty_like(shard) for _ in range(topology.tp)]
        dist.all_gather(shards, shard, group=topology.tp_group)
    if topology.is_writer:
        yield from merge_shards(plans, shards).items()


@dataclass(frozen=True)
class _Rectangle:
    """The position of a parameter's rows within a whole tensor."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    rows: slice
    """The rows within the rank's part of the parameter."""


def _rectangles(plan: Shard, first_row: int, num_rows: int) -> Iterator[_Rectangle]:
    """Yields the rectangles of rows first_row .. first_row + num_rows - 1 of the tensor-parallel shard that `plan`
    describes.

    They have the parameter's orientation, also where Hugging Face stores the tensor transposed.
    """
    row = 0
    for piece in plan.pieces:
        shape, is_columns = piece.parameter_shape, piece.cut_dim == 1
        size = shape[0] if is_columns else piece.size
        start, stop = max(row, first_row), min(row + size, first_row + num_rows)
        if start < stop:
            offset = (start, piece.start) if is_columns else (piece.start + start - row, *[0] * (len(shape) - 1))
            yield _Rectangle(piece.name, shape, offset, slice(start - first_row, stop - first_row))
        row += size


def _exit_rows(each: ExitOptimizer, config: ModelConfig, topology: Topology) -> Iterator[TrainedRows]:
    """Yields this rank's rows of an exit's parameters, as views."""
    for name, parameter in each.parameters.items():
        moments = each.adam.state[parameter]
        kinds = {"master": parameter, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        chunk = -(-parameter.shape[0] // topology.dp)  # fully_shard cuts rows as torch.chunk does
        yield TrainedRows(
            plan=exit_shard(each.head.spec, name, config, topology.tp, topology.tp_rank),
            first_row=topology.dp_rank * chunk,
            tensors={kind: _as_sharded(value.detach()).to_local() for kind, value in kinds.items()},
            replica=topology.tp_rank if is_replicated(each.head.spec, name, config, topology.tp) else 0,
        )


def _tensors(trained: Trained, config: ModelConfig, topology: Topology) -> dict[Any, ShardedTensor]:
    """Returns this rank's part of all master weights and moments, as views, keyed by tensor name, kind and offset."""
    tensors = {}
    rows = [own for each in trained.exits for own in _exit_rows(each, config, topology)]
    for own in [*rows, *(trained.backbone.rows() if trained.backbone else ())]:
        for kind, value in own.tensors.items():
            local = value.detach()
            for part in _rectangles(own.plan, own.first_row, local.shape[0]):
                data = local[part.rows]
                tensors[f"{part.name}.{kind}@{part.offset}"] = ShardedTensor(
                    f"{part.name}.{kind}",
                    data,
                    data.dtype,
                    tuple(data.shape),
                    part.shape,
                    part.offset,
                    axis_fragmentations=None,
                    replica_id=own.replica,
                )
    return tensors


def own_state(trained: Trained, config: ModelConfig, topology: Topology) -> dict[str, ShardedTensor]:
    """Returns this rank's part of a checkpoint: views, and copies of counts.

    Of ranks that hold the same tensor, one has `replica_id` 0.
    """
    state = _tensors(trained, config, topology)
    for each in trained.exits:
        count = next(iter(each.adam.state.values()))["step"].reshape(1).clone()
        replica_id = topology.tp_rank * topology.dp + topology.dp_rank
        state[_count_key(each.layer)] = _count(_count_key(each.layer), count, replica_id)
    if trained.backbone is not None:  # the same on every rank of every stage
        state[_BACKBONE_COUNT] = _count(_BACKBONE_COUNT, trained.backbone.num_updates.clone(), topology.rank)
    return state


def _count(key: str, count: Tensor, replica_id: int) -> ShardedTensor:
    return ShardedTensor(key, count, count.dtype, (1,), (1,), (0,), axis_fragmentations=None, replica_id=replica_id)


def _count_key(layer: int) -> str:
    return f"exits.{layer}.num_updates"


def _as_sharded(value: Tensor) -> DTensor:
    assert isinstance(value, DTensor)
    return value


def _read_progress(folder: Path, fixed: dict[str, Any]) -> TrainingProgress:
    path = folder / PROGRESS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree.setdefault("validated_step", tree.get("step"))  # earlier versions did not write it
        progress = TrainingProgress(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} can not be read: {error}; {_REMEDY}") from error
    for key, value in fixed.items():
        if progress.fixed.get(key) != value:
            raise InputError(
                f"a resumed run must keep its {key}: {folder} has {progress.fixed.get(key)}, got {value}; "
                "set it back, or use another tuning.run_folder"
            )
    return progress
