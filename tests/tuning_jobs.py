"""Small tuning runs on random tokens, for the worlds of the distributed tests, and what they leave in their folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ee_tuning import config as job
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.tuner import Tuner

NUM_STEPS = 4
OF_THE_MACHINE = {"tokens_per_second", "flops_per_second", "idle_share", "memory_bytes"}
"""Keys of records that differ from run to run."""


def configure(
    model: Path,
    run: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    exits: tuple[int, ...] = (2, 5),
    dtype: str = "float64",
    **tuning: Any,
) -> Config:
    settings = {
        "train_iters": NUM_STEPS,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "seq_length": 12,
        "lr": 1e-2,
        "eval_interval": 2,
        "eval_iters": 3,
        "save_interval": 0,
        "keep_checkpoints": 10,
        "clip_grad": 0.5,
        "weight_decay": 0.1,
        "loss_chunk_tokens": 5,
    }
    return job.replace(
        Config(),
        model={"path": str(model), "dtype": dtype},
        exits={"exit_layers": exits},
        parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        tuning={"run_folder": str(run), **settings, **tuning},
    )


def make_tuner(config: Config, kind: type[Tuner] = Tuner) -> Tuner:
    """In the world that exists, on random tokens."""
    Path(config.tuning.run_folder).mkdir(parents=True, exist_ok=True)
    topology = init_parallel(config.parallel)
    return kind(load_for_tuning(config, topology), make_samples(config.tuning.seq_length), config, topology)


def make_samples(length: int) -> Splits:
    """Random tokens."""
    draw = np.random.RandomState(5)
    return Splits(
        train=PackedSamples(draw.randint(0, 101, 11 * length + 1).astype(np.int32), length),
        valid=PackedSamples(draw.randint(0, 101, 3 * length + 1).astype(np.int32), length),
    )


def tune(config: Config) -> bool:
    tuner = make_tuner(config)
    if config.tuning.resume:
        tuner.resume()
    return tuner.run()


def records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.tuning.run_folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_THE_MACHINE} for line in lines]


def checkpoint(config: Config, step: int) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, whatever layout wrote it."""
    reader = dcp.FileSystemReader(Path(config.tuning.run_folder) / "checkpoints" / f"step_{step:08d}")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
