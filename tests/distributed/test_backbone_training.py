"""Training of the model itself over every layout: the same losses, steps and outputs as in one process."""

import gc
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from random_models import random_llama
from test_resuming import tune_until_signal
from test_tuning import assert_same_records
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_tuner, records, tune
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config

WAYS: dict[str, dict[str, Any]] = {
    "backbone": {"trainable": "backbone"},
    "lora": {"trainable": "lora", "lora_rank": 3},
    "last": {"trainable": "last:2", "loss_weights": (1.0, 0.5), "final_loss_weight": 0.0},
    "mlp with a teacher": {"trainable": "mlp", "loss": ("cross_entropy=0.3", "forward_kl=0.7")},
    "half": {"trainable": "half", "half_steps": 2},
    "layer skip": {"trainable": "backbone", "layer_dropout": 0.9, "depth_sampling": "rotate:2", "global_batch_size": 3},
    "sub-models": {"trainable": "all", "loss_weights": (0.5, 2.0)},
    "tied sub-models": {"trainable": "all", "loss": ("cross_entropy=0.3", "forward_kl=0.7")},
    "drawn depths": {"trainable": "backbone", "depth_sampling": "random", "global_batch_size": 3},
    "recomputed": {"trainable": "backbone", "recompute_activations": True, "loss_weights": (0.0, 1.0)},
}


def configure_way(model: Path, run: Path, way: str, **layout: int) -> Config:
    config = configure(model, run, **layout, **{"global_batch_size": 4, **WAYS[way]})
    if way == "tied sub-models":
        tied = run.parent / "tied"
        random_llama(tied, tie_word_embeddings=True)
        config = job.replace(config, model={"path": str(tied)})
    shares_head = "sub-models" in way or "depths" in way
    return job.replace(config, exits={"output": "shared"}) if shares_head else config


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Runs in one process, by their first use."""
    runs: dict[str, Config] = {}

    class Runs(dict[str, Config]):
        def __missing__(self, way: str) -> Config:
            config = configure(model, tmp_path_factory.mktemp("alone") / "run", **WAYS[way])
            assert tune(config)
            self[way] = config
            return config

    return Runs(runs)


@pytest.mark.parametrize(
    ("way", "tp", "pp", "cuts"),
    [
        ("backbone", 2, 2, True),
        ("backbone", 1, 1, False),
        ("lora", 2, 2, True),
        ("last", 1, 4, False),
        ("mlp with a teacher", 1, 2, False),
        ("half", 2, 2, True),
        ("layer skip", 1, 4, False),
        ("recomputed", 2, 2, False),
        ("sub-models", 2, 2, True),
        ("tied sub-models", 1, 4, False),
        ("tied sub-models", 2, 1, False),
        ("drawn depths", 1, 4, False),
    ],
)
def test_every_layout_takes_the_steps_of_one_process(
    world: World, model: Path, alone: dict[str, Config], tmp_path: Path, way: str, tp: int, pp: int, cuts: bool
) -> None:
    """A gradient that is left behind between stages, of another micro-batch, averaged, or summed twice over shards or
    replicas; a norm of one stage alone.
    """
    config = configure(model, tmp_path / "run", tp=tp, pp=pp, **WAYS[way])
    config = job.replace(config, parallel={"sequence_parallel": cuts})
    assert world.run(tune, config) == [True] * 4
    assert_same_records(records(config), records(alone[way]))
    got, wanted = checkpoint(config, NUM_STEPS), checkpoint(alone[way], NUM_STEPS)
    assert got.keys() == wanted.keys() and got["backbone.num_updates"].item() == NUM_STEPS
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)


def test_the_final_heads_loss_falls_and_is_in_every_record(alone: dict[str, Config]) -> None:
    """A step against the gradient, or a model that is reported and not trained."""
    found = records(alone["backbone"])
    assert all({"2", "5", "6"} == record["loss"].keys() for record in found)
    assert all(record["grad_norm"]["6"] > 0 for record in found if record["kind"] == "train")
    losses = [record["loss"]["6"] for record in found if record["kind"] == "validation"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("trainable", ["lora", "half"])
def test_a_stopped_run_goes_on_to_the_same_bits(world: World, model: Path, tmp_path: Path, trainable: str) -> None:
    """Weights of the model, moments or counts lost in a checkpoint; a step whose gradients are cut in half."""
    whole, parts = (
        configure(
            model, tmp_path / name, tp=2, pp=2, dtype="float32", trainable=trainable, half_steps=1, layer_dropout=0.3
        )
        for name in ("whole", "parts")
    )
    assert world.run(tune, whole) == [True] * 4
    assert world.run(tune_until_signal, parts) == [(False, 2)] * 4
    assert world.run(tune, parts) == [True] * 4
    got, wanted = checkpoint(parts, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(parts) == records(whole)


@pytest.mark.parametrize(("tp", "pp", "cuts"), [(2, 2, True), (1, 4, False)])
def test_a_teacher_model_teaches_the_same_at_every_layout(
    world: World, model: Path, tmp_path: Path, tp: int, pp: int, cuts: bool
) -> None:
    """The teacher's states of another micro-batch, or cut at another place than the student's."""
    random_llama(tmp_path / "teacher", seed=7, num_hidden_layers=5, hidden_size=32, intermediate_size=24)
    keys = {"trainable": "mlp", "teacher_model": str(tmp_path / "teacher"), "exits": (2,), "train_iters": 2}
    keys |= {"final_loss": ("cross_entropy=0.5", "forward_kl")}
    alone = configure(model, tmp_path / "alone", **keys)
    assert tune(alone)
    config = configure(model, tmp_path / "run", tp=tp, pp=pp, **keys)
    assert world.run(tune, job.replace(config, parallel={"sequence_parallel": cuts})) == [True] * 4
    assert_same_records(records(config), records(alone))


def num_threads_after_runs(configs: list[Config]) -> list[int]:
    """The threads of this rank after each run, whose optimizer is gone."""
    counts = []
    for config in configs:
        tuner = make_tuner(config)
        tuner.run()
        assert tuner.backbone is not None
        optimizer = weakref.ref(tuner.backbone.optimizer)
        del tuner
        gc.collect()
        assert optimizer() is None
        counts.append(psutil.Process().num_threads())
    return counts


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_a_run_that_has_ended_is_freed(world: World, model: Path, tmp_path: Path, trainable: str) -> None:
    """Optimizers, and the threads of their process groups, that a hook of their parameters keeps: hundreds in a process
    of many runs, each of which wakes a hundred times a second.
    """
    keys = {"tp": 2, "pp": 2, "trainable": trainable, "train_iters": 1}
    configs = [configure(model, tmp_path / f"run{n}", **keys) for n in range(4)]
    if trainable == "all":
        configs = [job.replace(config, exits={"output": "shared"}) for config in configs]
    for first, *_, last in world.run(num_threads_after_runs, configs):
        assert last <= first + 2, "each run leaves some"


def save(config: Config) -> str:
    tuner = make_tuner(config)
    tuner.run()
    return tuner.save_trained_weights(Path(config.tuning.run_folder) / "adapter")


@pytest.mark.parametrize("trainable", ["lora"])
def test_every_layout_writes_the_same_weights(world: World, model: Path, tmp_path: Path, trainable: str) -> None:
    """A tensor of another shard or stage in its place, and exits that are bound to another model than is read."""
    from safetensors.torch import load_file

    name = {"mlp": "trained", "lora": "adapter_model"}[trainable] + ".safetensors"
    one, many = (configure(model, tmp_path / each, trainable=trainable, eval_iters=0) for each in ("one", "many"))
    save(one)
    prints = world.run(
        save, job.replace(many, parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    )
    assert len(set(prints)) == 1
    got, wanted = (load_file(tmp_path / each / "adapter" / name) for each in ("many", "one"))
    assert got.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-5, atol=1e-6, msg=key)
