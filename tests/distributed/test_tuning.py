"""Tuning over every layout: the same losses, gradients and steps; exits that do not touch each other or the
backbone.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_tuner, records, tune
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config


def assert_same_records(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert {key: value for key, value in one.items() if not isinstance(value, dict)} == {
            key: value for key, value in other.items() if not isinstance(value, dict)
        }
        for key in ("loss", "grad_norm"):
            assert one.get(key, {}) == pytest.approx(other.get(key, {}), rel=1e-9)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run in one process."""
    config = configure(model, tmp_path_factory.mktemp("alone") / "run", save_interval=1, global_batch_size=8)
    assert tune(config)
    return config


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)])
def test_every_layout_takes_the_steps_of_one_process(
    world: World, model: Path, alone: Config, tmp_path: Path, tp: int, pp: int
) -> None:
    """A gradient averaged or left unsummed over replicas or shards, a norm that counts twice, or a batch read twice."""
    config = configure(model, tmp_path / "run", tp=tp, pp=pp, save_interval=1, global_batch_size=8)
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
    return {
        "same": digest() == before,
        "gradients": sum(p.grad is not None for p in backbone.parameters()),
        "wants": sum(p.requires_grad for p in backbone.parameters()),
        "parameters": len(list(backbone.parameters())),
    }


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_the_backbone_keeps_its_bytes_and_never_has_a_gradient(
    world: World, model: Path, tmp_path: Path, output: str
) -> None:
    """A tied output matrix trained along, or layers run with a graph behind them."""
    config = job.replace(configure(model, tmp_path / "run", tp=2, pp=2, dtype="float32"), exits={"output": output})
    for seen in world.run(tune_and_watch_backbone, config):
        assert seen["same"] and seen["parameters"] > 5 and seen["gradients"] == 0 and seen["wants"] == 0


def tune_with_a_broken_shard(config: Config) -> bool:
    tuner = make_tuner(config)
    if tuner.topology.tp_rank == 0 and tuner.topology.dp_rank == 0:
        tuner.exits[0].parameters["mlp.fc2.weight"].to_local().detach()[0, 0] = torch.nan  # type: ignore[attr-defined]
    return tuner.run()


def test_an_exit_whose_gradient_is_not_finite_is_left_alone_on_every_rank(
    world: World, model: Path, tmp_path: Path
) -> None:
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


def test_a_gradient_beyond_belief_is_left_out_of_its_exit_alone(world: World, model: Path, tmp_path: Path) -> None:
    """An explosion that gets into the moments, a limit compared with one shard's norm, an exit held up by its
    neighbour's explosion.
    """
    free = configure(model, tmp_path / "free", clip_grad=0.0)
    assert tune(free)
    norms = next(record["grad_norm"] for record in records(free) if record["kind"] == "train")
    (low, surer), (high, other) = sorted((norm, layer) for layer, norm in norms.items())
    limit = (low + high) / 2
    config = configure(model, tmp_path / "run", tp=2, clip_grad=0.0, skip_grad_norm=limit, save_interval=1)
    assert high > 1.02 * low and world.run(tune, config) == [True] * 4
    train = [record for record in records(config) if record["kind"] == "train"]
    first, last = checkpoint(config, 1), checkpoint(config, NUM_STEPS)
    assert first[f"exits.{surer}.num_updates"].item() == 1 and first[f"exits.{other}.num_updates"].item() == 0
    assert first[f"exits.{surer}.norm.weight.exp_avg"].any() and not first[f"exits.{other}.norm.weight.exp_avg"].any()
    for layer in (surer, other):
        skipped = [record["grad_norm"][layer] > limit for record in train]
        assert [record["skipped"].get(layer, 0) for record in train] == skipped
        assert last[f"exits.{layer}.num_updates"].item() == NUM_STEPS - sum(skipped)


def test_weight_zero_freezes_an_exit(model: Path, tmp_path: Path) -> None:
    """Weight decay or momentum that moves an exit nobody asked to train."""
    config = configure(model, tmp_path / "run", loss_weights=(0.0, 1.0), save_interval=1)
    assert tune(config)
    first, last = checkpoint(config, 1), checkpoint(config, NUM_STEPS)
    for name in first:
        if name.endswith(".master"):
            assert torch.equal(first[name], last[name]) == name.startswith("exits.2."), name
