"""Tuning over every layout: the same losses, gradients and steps; resuming; exits that do not touch each other or the backbone."""
import hashlib
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from random_models import random_llama
from torch import Tensor
from world import World

from ee_tuning import config as job
from ee_tuning.checkpoint.load import load_for_tuning
from ee_tuning.checkpoint.manifest import write_manifest
from ee_tuning.config import Config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.tuner import Tuner

NUM_STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


def configure(model: Path, run: Path, *, tp: int = 1, pp: int = 1, exits: tuple[int, ...] = (2, 5), dtype: str = "float64",
              **tuning: Any) -> Config:
    settings = {"train_iters": NUM_STEPS, "micro_batch_size": 1, "global_batch_size": 8, "seq_length": 12, "lr": 1e-2, "eval_interval": 2,
                "eval_iters": 3, "save_interval": 0, "keep_checkpoints": 10, "clip_grad": 0.5, "weight_decay": 0.1, "loss_chunk_tokens": 5}
    return job.replace(Config(), model={"path": str(model), "dtype": dtype}, exits={"exit_layers": exits},
                       parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
                       tuning={"run_folder": str(run), **settings, **tuning})


def make_tuner(config: Config, kind: type[Tuner] = Tuner) -> Tuner:
    """In the world that exists, on random tokens."""
    Path(config.tuning.run_folder).mkdir(parents=True, exist_ok=True)
    topology = init_parallel(config.parallel)
    draw = np.random.RandomState(5)
    length = config.tuning.seq_length
    samples = Splits(train=PackedSamples(draw.randint(0, 101, 23 * length + 1).astype(np.int32), length),
                     valid=PackedSamples(draw.randint(0, 101, 3 * length + 1).astype(np.int32), length))
    return kind(load_for_tuning(config, topology), samples, config, topology)


def tune(config: Config) -> bool:
    tuner = make_tuner(config)
    if config.tuning.resume:
        tuner.resume()
    return tuner.run()


def records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.tuning.run_folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in lines]


def checkpoint(config: Config, step: int) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, whatever layout wrote it."""
    reader = dcp.FileSystemReader(Path(config.tuning.run_folder) / "checkpoints" / f"step_{step:08d}")
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_records(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert {key: value for key, value in one.items() if not isinstance(value, dict)} == \
               {key: value for key, value in other.items() if not isinstance(value, dict)}
        for key in ("loss", "grad_norm"):
            assert one.get(key, {}) == pytest.approx(other.get(key, {}), rel=1e-9)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run in one process."""
    config = configure(model, tmp_path_factory.mktemp("alone") / "run", save_interval=1)
    assert tune(config)
    return config


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)])
def test_every_layout_takes_the_steps_of_one_process(world: World, model: Path, alone: Config, tmp_path: Path, tp: int, pp: int) -> None:
    """A gradient averaged or left unsummed over replicas or shards, a norm that counts twice, or a batch read twice."""
    config = configure(model, tmp_path / "run", tp=tp, pp=pp, save_interval=1)
    assert world.run(tune, config) == [True] * 4
    assert [record["kind"] for record in records(alone)] == ["validation", *["train", "train", "validation"] * 2]
    assert_same_records(records(config), records(alone))
    first, wanted = checkpoint(config, 1), checkpoint(alone, 1)
    assert first.keys() == wanted.keys() and "exits.5.mlp.gate_proj.weight.exp_avg" in first
    for name in wanted:  # after one step exp_avg is a tenth of the clipped gradient
        torch.testing.assert_close(first[name], wanted[name], rtol=1e-9, atol=1e-11, msg=name)
    last, wanted = checkpoint(config, NUM_STEPS), checkpoint(alone, NUM_STEPS)
    for name in wanted:
        torch.testing.assert_close(last[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)


class StoppedTuner(Tuner):
    """Gets a signal on one rank of the first stage during its second step."""

    def _train_step(self, *args: Any) -> bool:
        if self.step == 1 and self.topology.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._train_step(*args)


def tune_until_signal(config: Config) -> tuple[bool, int]:
    tuner = make_tuner(config, StoppedTuner)
    return tuner.run(), tuner.step


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 2)])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(world: World, model: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """Moments, step counts, masters or a data position lost in a checkpoint; stages that disagree on where to stop."""
    whole = configure(model, tmp_path / "whole", tp=tp, pp=pp, dtype="float32")
    parts = configure(model, tmp_path / "parts", tp=tp, pp=pp, dtype="float32")
    assert world.run(tune, whole) == [True] * 4
    assert world.run(tune_until_signal, parts) == [(False, 2)] * 4
    assert world.run(tune, job.replace(parts, tuning={"resume": True})) == [True] * 4
    got, wanted = checkpoint(parts, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [r for r in records(parts) if r["kind"] == "train"] == [r for r in records(whole) if r["kind"] == "train"]


def test_a_run_resumes_under_another_layout(world: World, model: Path, tmp_path: Path) -> None:
    """Checkpoint tensors that are some layout's shards and not rectangles of whole ones."""
    config = configure(model, tmp_path / "run", lr_decay_style="constant", lr_warmup_fraction=0.0)
    straight = job.replace(config, tuning={"run_folder": str(tmp_path / "straight")})
    assert tune(job.replace(config, tuning={"train_iters": 2})) and tune(straight)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    assert world.run(tune, job.replace(config, tuning={"resume": True}, parallel=layout)) == [True] * 4
    got, wanted = checkpoint(config, NUM_STEPS), checkpoint(straight, NUM_STEPS)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)


def test_exits_tuned_together_are_those_tuned_alone(model: Path, tmp_path: Path) -> None:
    """A gradient, a clip or an optimizer state that crosses from one exit to another."""
    together = configure(model, tmp_path / "together", dtype="float32")
    assert tune(together)
    for layer in (2, 5):
        single = configure(model, tmp_path / f"single{layer}", dtype="float32", exits=(layer,))
        assert tune(single)
        tensors, all_tensors = checkpoint(single, NUM_STEPS), checkpoint(together, NUM_STEPS)
        assert tensors and all(torch.equal(tensor, all_tensors[name]) for name, tensor in tensors.items())


def tune_and_watch_backbone(config: Config) -> dict[str, Any]:
    tuner = make_tuner(config)
    backbone = tuner._model.backbone

    def digest() -> str:
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in backbone.parameters())).hexdigest()
    before = digest()
    tuner.run()
    return {"same": digest() == before, "gradients": sum(p.grad is not None for p in backbone.parameters()),
            "wants": sum(p.requires_grad for p in backbone.parameters()), "parameters": len(list(backbone.parameters()))}


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_the_backbone_keeps_its_bytes_and_never_has_a_gradient(world: World, model: Path, tmp_path: Path, output: str) -> None:
    """A tied output matrix trained along, or layers run with a graph behind them."""
    config = job.replace(configure(model, tmp_path / "run", tp=2, pp=2, dtype="float32"), exits={"output": output})
    for seen in world.run(tune_and_watch_backbone, config):
        assert seen["same"] and seen["parameters"] > 5 and seen["gradients"] == 0 and seen["wants"] == 0


def tune_with_a_broken_shard(config: Config) -> bool:
    tuner = make_tuner(config)
    if tuner.topology.tp_rank == 0 and tuner.topology.dp_rank == 0:
        tuner.exits[0].parameters["mlp.fc2.weight"].to_local().detach()[0, 0] = torch.nan  # type: ignore[attr-defined]
    return tuner.run()


def test_an_exit_whose_gradient_is_not_finite_is_left_alone_on_every_rank(world: World, model: Path, tmp_path: Path) -> None:
    """A decision taken on one rank's own loss hangs the others; a skipped exit must not hold up its neighbour."""
    config = configure(model, tmp_path / "run", tp=2, dtype="float32")
    healthy = configure(model, tmp_path / "healthy", tp=2, dtype="float32")
    assert world.run(tune_with_a_broken_shard, config) == world.run(tune, healthy) == [True] * 4
    got, wanted = checkpoint(config, NUM_STEPS), checkpoint(healthy, NUM_STEPS)
    assert got["exits.2.num_updates"].item() == 0 and wanted["exits.2.num_updates"].item() == NUM_STEPS
    assert not got["exits.2.norm.weight.exp_avg"].any()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted if name.startswith("exits.5."))
    train = [record for record in records(config) if record["kind"] == "train"]
    assert all(record["grad_norm"]["2"] is None and record["grad_norm"]["5"] > 0 for record in train)


def test_weight_zero_freezes_an_exit(model: Path, tmp_path: Path) -> None:
    """Weight decay or momentum that moves an exit nobody asked to train."""
    config = configure(model, tmp_path / "run", loss_weights=(0.0, 1.0), save_interval=1)
    assert tune(config)
    first, last = checkpoint(config, 1), checkpoint(config, NUM_STEPS)
    for name in first:
        if name.endswith(".master"):
            assert torch.equal(first[name], last[name]) == name.startswith("exits.2."), name


def test_older_checkpoints_go_and_a_foreign_one_is_refused(model: Path, tmp_path: Path) -> None:
    """A disk filled by old checkpoints; a run that goes on from another run's heads."""
    config = configure(model, tmp_path / "run", keep_checkpoints=2, save_interval=1)
    assert tune(config)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000004"]
    with pytest.raises(InputError, match="must keep its exit_layers"):
        make_tuner(configure(model, tmp_path / "run", exits=(2,))).resume()
    damaged = tmp_path / "run" / "checkpoints" / "step_00000004" / "__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match="is altered"):
        make_tuner(config).resume()




class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


def test_a_pickle_that_runs_commands_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch unpickles a checkpoint's .metadata without a question; the manifest beside it is no protection from who wrote both."""
    monkeypatch.chdir(tmp_path)
    config = configure(model, tmp_path / "run", train_iters=1)
    assert tune(config)
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    write_manifest(folder)
    with pytest.raises(InputError, match=r"asks for posix\.system"):
        make_tuner(config).resume()
    assert not (tmp_path / "hostile").exists()
