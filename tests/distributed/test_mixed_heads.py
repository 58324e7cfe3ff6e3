"""A run whose exits have every architecture there is: over every layout, in parts, and each exit alone."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file
from torch import Tensor
from tuning_jobs import checkpoint, configure, make_tuner, records, tune
from world import World

from ee_tuning import config as job
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.config import Architecture, Config

LAYERS = (1, 2, 3, 4, 5, 6)
KINDS: tuple[Architecture, ...] = tuple(kind for kind in get_args(Architecture) if kind != "eagle3")
NUM_STEPS = 6


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3: norms of queries and keys, which each tensor-parallel rank holds alike and uses for its own
    heads.
    """
    folder = tmp_path_factory.mktemp("qwen3")
    random_model("qwen3", folder)
    return folder


def mixed(
    model: Path, run: Path, *, layers: tuple[int, ...] = LAYERS, tp: int = 1, pp: int = 1, **tuning: object
) -> Config:
    settings = {"train_iters": NUM_STEPS, "eval_interval": 3, "global_batch_size": 4, **tuning}
    config = configure(model, run, exits=layers, tp=tp, pp=pp, **settings)
    kinds = tuple(kind for layer, kind in zip(LAYERS, KINDS, strict=True) if layer in layers)
    return job.replace(config, exits={"architecture": kinds, "adapter_rank": 7})


@pytest.fixture(scope="module")
def alone(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run in one process."""
    config = mixed(qwen, tmp_path_factory.mktemp("alone") / "run")
    assert tune(config)
    return config


def tune_to_artifact(config: Config) -> bool:
    tuner = make_tuner(config)
    is_finished = tuner.run()
    tuner.save_exit_heads(tuner.run_folder / "exit_heads")
    return is_finished


@pytest.mark.parametrize(
    ("tp", "pp", "cuts_sequence", "chunk"),
    [(1, 2, True, 0), (2, 1, True, 0), (2, 2, False, 0), (2, 2, True, 0), (2, 2, True, 4), (1, 4, False, 6)],
)
def test_every_architecture_takes_the_steps_of_one_process(
    world: World, qwen: Path, alone: Config, tmp_path: Path, tp: int, pp: int, cuts_sequence: bool, chunk: int
) -> None:
    """A query norm trained by the gradient of one rank's heads, a bias's or an adapter's summed over ranks that have it
    alike; of a sequence in parts, a norm trained by one rank's tokens, a part taken for the whole; of chunks, a rank's
    parts joined as if they were its part of the whole.
    """
    config = mixed(qwen, tmp_path / "run", tp=tp, pp=pp, forward_chunk_length=chunk)
    config = job.replace(config, parallel={"sequence_parallel": cuts_sequence})
    assert world.run(tune_to_artifact, config) == [True] * 4
    for got, wanted in zip(records(config), records(alone), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-6) and set(got["loss"]) == set(map(str, LAYERS))
        assert got.get("grad_norm", {}) == pytest.approx(wanted.get("grad_norm", {}), rel=1e-4)
    last, wanted = checkpoint(config, NUM_STEPS), checkpoint(alone, NUM_STEPS)
    assert last.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(last[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    artifact = load_file(tmp_path / "run" / "exit_heads" / "exit_heads.safetensors")
    assert_moved(artifact, first_weights(qwen, tmp_path / "first"))
    with ExitHeadsReader(tmp_path / "run" / "exit_heads") as reader:
        assert reader.config.architecture == KINDS and reader.config.adapter_rank == 7
        assert all(torch.equal(artifact[name], wanted_master) for name, wanted_master in masters(last).items())


def masters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(".master"): tensor.float() for name, tensor in state.items() if name.endswith(".master")}


def first_weights(model: Path, run: Path) -> dict[str, Tensor]:
    make_tuner(mixed(model, run)).save_exit_heads(run / "exit_heads")
    return load_file(run / "exit_heads" / "exit_heads.safetensors")


def assert_moved(tuned: dict[str, Tensor], first: dict[str, Tensor]) -> None:
    assert tuned.keys() == first.keys()
    for name, tensor in tuned.items():
        assert (tensor - first[name]).abs().max() > 1e-3, f"{name} is not trained"


def test_exits_of_any_architecture_tuned_together_are_those_tuned_alone(
    qwen: Path, alone: Config, tmp_path: Path
) -> None:
    """A `layer` head that runs into its neighbour's states, a rank or an architecture read from another exit's
    place.
    """
    together = checkpoint(alone, NUM_STEPS)
    for layer in LAYERS:
        single = mixed(qwen, tmp_path / str(layer), layers=(layer,))
        assert tune(single)
        tensors = checkpoint(single, NUM_STEPS)
        assert tensors and all(torch.equal(tensor, together[name]) for name, tensor in tensors.items()), layer


def test_a_mixed_run_in_two_parts_is_the_run_in_one_to_the_bit(world: World, qwen: Path, tmp_path: Path) -> None:
    """Moments of a `layer` head saved under the backbone layer's name; replicated parts restored from another
    rank's.
    """
    settings = {"train_iters": 4, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0, "eval_interval": 0}
    whole = mixed(qwen, tmp_path / "whole", tp=2, pp=2, **settings)
    parts = mixed(qwen, tmp_path / "parts", tp=2, pp=2, **settings)
    world.run(tune, whole)
    world.run(tune, job.replace(parts, tuning={"train_iters": 2}))
    world.run(tune, job.replace(parts, tuning={"resume": True}))
    got, wanted = checkpoint(parts, 4), checkpoint(whole, 4)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
