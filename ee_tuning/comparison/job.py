"""A comparison: what it is asked for, checked and counted before anything runs, and where everything lies."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ee_tuning.command_steps import Flag, ee_tuning, under_torchrun
from ee_tuning.config import Config, Trainable
from ee_tuning.data.loader import count_microbatches
from ee_tuning.data.splits import check_data_settings
from ee_tuning.errors import InputError
from ee_tuning.evaluation.points import check_thresholds
from ee_tuning.evaluation.task import Metric
from ee_tuning.json_file import parse_json, to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.pruning.choice import Measure
from ee_tuning.tuning.fitting import num_fit_tokens

SEQ_LENGTH = 256
"""Default tokens of a training sample, where the model has as many positions."""
THRESHOLDS = (0.9, 0.8, 0.6)
DEPTHS = (0.75, 0.5)
"""Default shares of the layers."""

RunCommand = Callable[[list[str], Path], None]
"""Runs a command line, and keeps what it prints in a file. Raises InputError where it fails."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `ee-tuning compare` is asked for beside the job."""

    output: Path
    tokens: int
    """Tokens that each way is tuned on."""
    ways: tuple[str, ...]
    depths: tuple[float, ...] = ()
    """Shares of the layers; empty where exits.exit_layers names layers, or for DEPTHS."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Way -> learning rate, where it is not the way's own."""
    trainable: str = "lora"
    """What healing trains: a value of tuning.trainable."""
    measure: Measure = "angular"
    """How `prune` chooses layers."""
    thresholds: tuple[float, ...] = THRESHOLDS
    tasks: tuple[Path, ...] = ()
    metrics: tuple[Metric, ...] = ()
    """One for all tasks, or one for each."""
    num_samples: int = 64
    """Held-out samples of the loss."""
    num_prompts: int = 12
    """Held-out prompts that are continued, for the speed."""
    repeats: int = 2
    """Times that each prompt is continued; the shortest counts."""
    num_processes: int | None = None
    """Processes of each step; by default tensor × pipeline."""
    dry_run: bool = False
    as_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison whose text is there. Paths are within the folder `output`."""

    config: Config
    """The job of all steps, without exits; its data are what heads are tuned on."""
    options: CompareOptions
    shape: ModelConfig
    depths: tuple[int, ...]
    """Layers, deep to shallow."""
    metrics: Mapping[str, str]
    """Further task -> its metric."""
    run_command: RunCommand

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.options.output

    @property
    def model(self) -> str:
        """The whole model."""
        return self.config.model.path

    @property
    def num_steps(self) -> int:
        """Optimizer steps of each tuned way."""
        return self.options.tokens // step_tokens(self.config)

    @property
    def tuning_tokens(self) -> int:
        """Tokens that each tuned way reads in training."""
        return self.num_steps * step_tokens(self.config)

    @property
    def fit_tokens(self) -> int:
        """Tokens that a linear fit reads: at most as many as tuning does."""
        return min(num_fit_tokens(self.config.tuning, self.shape.hidden_size), self.tuning_tokens)

    @property
    def can_fit(self) -> bool:
        """Whether there are more tokens than a state has numbers, which a fit needs."""
        return self.fit_tokens > self.shape.hidden_size

    def rate(self, way: str, default: float) -> float:
        """The learning rate of a way."""
        return self.options.rates.get(way, default)

    def run(self, name: str, command: str, **flags: Flag) -> None:
        """Runs a command with the comparison's job, and keeps what it prints in logs/`name`.log."""
        line = ee_tuning(command, self.folder / JOB_FILE, **flags)
        count = num_processes(self.config, self.options)
        self.run_command(under_torchrun(count, line) if count > 1 else line, self.folder / "logs" / f"{name}.log")


JOB_FILE = "job.yaml"


def step_tokens(config: Config) -> int:
    """Tokens of an optimizer step."""
    return config.tuning.global_batch_size * config.tuning.seq_length


def processes_of_a_replica(config: Config) -> int:
    """Tensor × pipeline. Raises InputError where one of them is below 1."""
    sizes = (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
    if min(sizes) < 1:
        raise InputError(f"tensor and pipeline parallel sizes must be at least 1, got {sizes[0]} and {sizes[1]}")
    return sizes[0] * sizes[1]


def num_processes(config: Config, options: CompareOptions) -> int:
    """Processes of each step."""
    layout = processes_of_a_replica(config)
    count = options.num_processes or layout
    if count < layout or count % layout:
        raise InputError(
            f"--nproc must be a multiple of tensor × pipeline = {layout}, got {count}; leave it out for {layout}"
        )
    return count


def as_compared(config: Config, shape: ModelConfig) -> Config:
    """`config` with the default sample length, and without validations within the runs: everything is measured alike
    afterwards.
    """
    length = config.tuning.seq_length or min(SEQ_LENGTH, shape.max_position_embeddings)
    tuning = dataclasses.replace(config.tuning, seq_length=length, eval_iters=0)
    return dataclasses.replace(config, tuning=tuning)


def check_options(config: Config, options: CompareOptions) -> None:
    """Raises InputError on values out of range."""
    for name, value, least in (
        ("samples", options.num_samples, 2),
        ("prompts", options.num_prompts, 1),
        ("repeats", options.repeats, 1),
        ("nproc", options.num_processes or 1, 1),
    ):
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    if config.model.adapter:
        raise InputError(
            f"compare takes a model without model.adapter, got {config.model.adapter}; merge both first (ee-tuning export "
            "--format hf), and give the merged folder"
        )
    if config.model.config or config.model.trust_pickle:
        raise InputError(
            "compare takes a model that every step can open as it is, without model.config and model.trust_pickle; write it as a "
            "Hugging Face folder first (ee-tuning export --format hf), and give that"
        )
    if config.generation.budget is not None:
        raise InputError("compare measures every depth, and generation.budget chooses one; leave it out")
    if config.exits.path:
        raise InputError(f"compare makes its exits, and exits.path is {config.exits.path}; leave it out")
    if config.exits.drafts:
        raise InputError(
            "compare is of exits, and eagle3 is a drafting head, at which no token leaves; use another --architecture"
        )
    if not Trainable.of(options.trainable).has_backbone:
        raise InputError(
            "--trainable must be lora, mlp, last:K, half, backbone or all, for healing trains layers, got heads"
        )
    check_thresholds(options.thresholds)
    for way, rate in options.rates.items():
        if not 0 < rate < 1000:
            raise InputError(f"--lr must be above 0 and below 1000, got {rate:g} for {way}; 1e-3 is usual")
    num_processes(config, options)


def check_tokens(config: Config, options: CompareOptions, shape: ModelConfig) -> None:
    """Raises InputError where batches or samples have no possible size, or --tokens are no step. `config` is
    `as_compared`.
    """
    tuning = config.tuning
    count_microbatches(tuning, num_processes(config, options) // processes_of_a_replica(config))
    check_data_settings(config.data, tuning.seq_length, shape.max_position_embeddings, needs_validation=True)
    if options.tokens < step_tokens(config):
        raise InputError(
            f"--tokens must be at least {step_tokens(config)}, one step of {tuning.global_batch_size} sequences of "
            f"{tuning.seq_length}, got {options.tokens}; give more, or lower --global-batch-size or --seq-length"
        )
    read = options.tokens // step_tokens(config) * step_tokens(config)
    fitted = min(num_fit_tokens(tuning, shape.hidden_size), read)
    if "fitted" in options.ways and fitted <= shape.hidden_size:
        what = "tuning.fit_tokens" if fitted < read else "--tokens"
        raise InputError(
            f"{what} must be more than {shape.hidden_size} for the way fitted, one for each number of a state, got {fitted} in "
            "whole steps; give more, or name other --ways"
        )


def depths_of(config: Config, options: CompareOptions, num_layers: int) -> tuple[int, ...]:
    """Returns the depths in layers, deep to shallow. Raises InputError where one leaves nothing, or everything."""
    layers = config.exits.layers(num_layers)
    if layers and options.depths:
        raise InputError("--depth and --exit-layers both say how deep to go; leave one of them out")
    wrong = [share for share in options.depths if not 0 < share < 1]
    if wrong:
        raise InputError(
            f"--depth must be shares of the layers between 0 and 1, got {wrong[0]:g}; for example 0.75 0.5"
        )
    found = sorted({*(layers or (round(share * num_layers) for share in options.depths or DEPTHS))}, reverse=True)
    for layer in found:
        if not 2 <= layer < num_layers:
            shown = "" if layers else f" ({layer / num_layers:.2g} of {num_layers})"
            raise InputError(
                f"--depth must leave 2 to {num_layers - 1} of the model's {num_layers} layers, of which the first and the "
                f"last always stay, got {layer}{shown}; choose another"
            )
    return tuple(found)


def settings_of(
    config: Config, options: CompareOptions, depths: Sequence[int], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns everything that the figures depend on, as plain data. The ways are left out: more of them may be
    asked for later.
    """
    kept: dict[str, Any] = {"depths in layers": list(depths), **facts}
    for name in ("tokens", "trainable", "measure", "thresholds", "num_samples", "num_prompts", "repeats"):
        kept[name] = getattr(options, name)
    kept["processes"] = num_processes(config, options)
    for section in ("exits", "parallel", "data", "tuning", "generation"):
        for key, value in dataclasses.asdict(getattr(config, section)).items():
            if key not in _FREE:
                kept[f"{section}.{key}"] = value
    found: dict[str, Any] = parse_json(to_json(kept, default=str).encode())
    return found


_FREE = {"run_folder", "cache", "workers", "paths", "valid_paths", "exit_layers", "wandb_project", "log_interval"}
"""Keys that the figures do not depend on, or whose content counts (`facts`)."""
