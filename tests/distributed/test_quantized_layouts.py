"""Tuning on weights of few bits: the same at every layout, and exactly resumed."""

from pathlib import Path

import pytest
import torch
from random_models import random_llama
from tuning_jobs import NUM_STEPS, checkpoint, configure, records, tune
from world import World

from ee_tuning import config as job


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rows are whole blocks of 64 weights on each of two ranks."""
    folder = tmp_path_factory.mktemp("wide")
    random_llama(folder, hidden_size=64, intermediate_size=128, head_dim=32, num_hidden_layers=4)
    return folder


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_every_layout_learns_from_the_same_weights(world: World, wide: Path, tmp_path: Path, weights: str) -> None:
    """A scale of a rank's own part of a row: exits tuned at one size would meet another backbone at the next, and a
    resumed run, too.
    """
    one, laid_out = (
        configure(wide, tmp_path / f"{tp}", tp=tp, pp=tp, exits=(2, 4), backbone_weights=weights) for tp in (1, 2)
    )
    native = configure(wide, tmp_path / "native", exits=(2, 4))
    assert tune(one) and tune(native) and world.run(tune, laid_out) == [True] * 4
    for got, wanted, unrounded in zip(*map(records, (laid_out, one, native)), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert got["loss"] != pytest.approx(unrounded["loss"], rel=1e-6)
    tensors, wanted = (checkpoint(each, NUM_STEPS) for each in (laid_out, one))
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(("weights", "cuts"), [("int8", False), ("nf4", True)])
def test_lora_beside_them_learns_the_same_at_every_layout(
    world: World, wide: Path, tmp_path: Path, weights: str, cuts: bool
) -> None:
    """QLoRA whose gradient is a rank's share of it."""
    keys = {"exits": (2,), "backbone_weights": weights, "trainable": "lora", "train_iters": 2}
    one, laid_out = (configure(wide, tmp_path / f"{tp}", tp=tp, pp=tp, **keys) for tp in (1, 2))
    laid_out = job.replace(laid_out, parallel={"sequence_parallel": cuts})
    assert tune(one) and world.run(tune, laid_out) == [True] * 4
    for got, wanted in zip(*map(records, (laid_out, one)), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
    tensors, wanted = (checkpoint(each, 2) for each in (laid_out, one))
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)


def test_replicas_get_what_the_first_one_rounded_and_may_cut_the_sequence(
    world: World, wide: Path, tmp_path: Path
) -> None:
    """Buffers of replicas that read nothing, left as they were made; a map that takes its rank's tokens for all."""
    one, shared = (configure(wide, tmp_path / f"{tp}", tp=tp, exits=(2, 4), backbone_weights="int8") for tp in (1, 2))
    shared = job.replace(shared, parallel={"sequence_parallel": True})
    assert tune(one) and world.run(tune, shared) == [True] * 4
    for got, wanted in zip(*map(records, (shared, one)), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-9)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_a_resumed_run_is_the_run_never_stopped(wide: Path, tmp_path: Path, weights: str) -> None:
    """Weights rounded anew from what had been rounded."""
    whole = configure(
        wide,
        tmp_path / "whole",
        exits=(2, 4),
        dtype="float32",
        backbone_weights=weights,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
    )
    parts = job.replace(whole, tuning={"run_folder": str(tmp_path / "parts")})
    assert tune(whole) and tune(job.replace(parts, tuning={"train_iters": 2})) and tune(parts)
    got, wanted = checkpoint(parts, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
