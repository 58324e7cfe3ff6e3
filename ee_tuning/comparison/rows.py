"""Rows of a comparison: from what `ee-tuning evaluate` wrote about each model, and from sizes of files and shapes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.checkpoint.model_size import parameters_by_part
from ee_tuning.comparison.texts import LOSS_TASK, SPEED_TASK
from ee_tuning.comparison.ways import Entry
from ee_tuning.config import ModelSection
from ee_tuning.errors import InputError
from ee_tuning.evaluation.bootstrap import Estimate
from ee_tuning.evaluation.evaluation_folder import FIGURES
from ee_tuning.json_file import read_json
from ee_tuning.model_config.config import ModelConfig

CACHED_TOKENS = 1000
"""Tokens whose keys and values count as memory."""
BASELINE = "full depth"
_KINDS = ("all_layers", "fixed", "threshold", "speculative", "calibration")
"""The order of rows within a way."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model, or a way to leave it, measured."""

    way: str
    name: str
    """How tokens leave, or the layers of a pruned model."""
    kind: str
    """PointKind, or `failed`."""
    depth: float = math.nan
    """Mean layers of a token while prompts are continued."""
    read_depth: float = math.nan
    """The same while held-out text is read, as for the loss."""
    loss: Estimate | None = None
    """Held-out, in nats per token."""
    speedup: Estimate | None = None
    """Tokens per second ÷ those of the whole model at full depth in the same run."""
    tokens_per_second: float | None = None
    agreement: Estimate | None = None
    """Share of the tokens that the whole model predicts, too."""
    tasks: dict[str, Estimate] = field(default_factory=dict)
    """Scores of further tasks."""
    memory_bytes: int = 0
    """Weights as decoding holds them, with keys and values of CACHED_TOKENS tokens."""
    disk_bytes: int = 0
    """Files of weights: the model's, and its exits'."""
    tuning_tokens: int = 0
    error: str = ""
    """Why there are no figures."""
    evaluation: str = ""
    """Folder of the evaluation, within the comparison's."""

    def tree(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """An evaluation, as far as rows need it."""

    tasks: dict[str, list[dict[str, Any]]]
    """Task -> its points, full depth first."""
    dtype: str


def read_evaluation(folder: Path) -> Measured:
    """Reads the figures of an evaluation. Raises InputError where they are damaged."""
    try:
        tree = read_json(folder / FIGURES)
        tasks = {task["name"]: task["points"] for task in tree["tasks"]}
        if not (tasks[LOSS_TASK] and tasks[SPEED_TASK]):
            raise ValueError("it has no figures")
        return Measured(tasks, tree["settings"]["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        found = f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{folder / FIGURES} is damaged: {found}; remove {folder}, and it is measured again"
        ) from error


def rows_of(way: str, entry: Entry, measured: Measured, evaluation: str) -> list[Row]:
    """Returns the rows of an entry: one for each policy but full depth, which is the baseline's."""
    sizes = _sizes(entry.model, measured.dtype, entry.exits, entry.adapter)
    points = [point for point in measured.tasks[LOSS_TASK] if point["kind"] != "full"]
    points.sort(key=lambda point: (_KINDS.index(point["kind"]), -(point["value"] or 0)))
    return [_row(way, measured, point["name"], sizes, entry.tokens, evaluation) for point in points]


def baseline(model: str, measured: Measured, evaluation: str) -> Row:
    """Returns the row of the whole model at full depth."""
    name = measured.tasks[LOSS_TASK][0]["name"]
    return _row(BASELINE, measured, name, _sizes(model, measured.dtype), 0, evaluation)


def failed(way: str, entry: Entry, error: str) -> Row:
    """Returns the row of an entry that could not be made or measured."""
    return Row(way=way, name=entry.name, kind="failed", error=error)


def _row(way: str, measured: Measured, name: str, sizes: tuple[int, int], tuning_tokens: int, evaluation: str) -> Row:
    by_task = {
        task: next(point for point in points if point["name"] == name) for task, points in measured.tasks.items()
    }
    read, said = by_task[LOSS_TASK], by_task[SPEED_TASK]
    depth = said["mean_depth"]["value"]
    is_whole = read["kind"] in ("full", "all_layers")
    return Row(
        way=way,
        name=f"{depth:.0f} layers" if is_whole else name,
        kind=read["kind"],
        depth=depth,
        read_depth=read["mean_depth"]["value"],
        loss=_logarithm(_estimate(read["metric"])),
        speedup=_estimate(said["speedup"]),
        tokens_per_second=said["tokens_per_second"],
        agreement=_estimate(said["agreement"]),
        tasks={
            task: _estimate(point["metric"]) for task, point in by_task.items() if task not in (LOSS_TASK, SPEED_TASK)
        },
        memory_bytes=sizes[0],
        disk_bytes=sizes[1],
        tuning_tokens=tuning_tokens,
        evaluation=evaluation,
    )


def _estimate(tree: Mapping[str, float | None]) -> Estimate:
    """Reads a figure; JSON has null for NaN."""
    return Estimate(*(math.nan if tree[key] is None else float(tree[key] or 0.0) for key in ("value", "low", "high")))


def _logarithm(perplexity: Estimate) -> Estimate:
    return Estimate(*(math.log(each) for each in (perplexity.value, perplexity.low, perplexity.high)))


def _sizes(model: str, dtype: str, exits: Path | None = None, adapter: Path | None = None) -> tuple[int, int]:
    """Returns (bytes in memory, bytes on disk) of a model with its exits and trained weights."""
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    source, shape, _ = open_model(ModelSection(path=model))
    with source:
        folder = source.folder if source.folder.is_dir() else source.folder.parent
        disk = sum((folder / name).stat().st_size for name in source.weight_files())
    numbers = parameters_by_part(shape)["all"] + _cached_numbers(shape)
    if exits is not None:
        with ExitHeadsReader(exits, verifies=False) as reader:
            numbers += sum(math.prod(each) for each in reader.config.tensor_shapes(shape).values())
    disk += sum(path.stat().st_size for each in (exits, adapter) if each for path in each.iterdir() if path.is_file())
    return numbers * width, disk


def _cached_numbers(shape: ModelConfig) -> int:
    return 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * CACHED_TOKENS
