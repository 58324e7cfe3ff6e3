"""Exits fitted by several processes are those of one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from tuning_jobs import configure, make_samples
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.fitting import fit_exits

LAYERS = (1, 2, 4, 5, 6)


def fitting_job(model: Path, *, tp: int = 1, pp: int = 1, cuts_sequence: bool = False, chunk: int = 0) -> Config:
    config = configure(model, model / "run", exits=LAYERS, tp=tp, pp=pp, forward_chunk_length=chunk)
    exits = {
        "architecture": ("norm", "linear", "layer", "mlp", "adapter"),
        "adapter_rank": 7,
        "init": "fitted",
        "output": "untied",
    }
    return job.replace(config, exits=exits, parallel={"sequence_parallel": cuts_sequence})


def fitted_maps(config: Config) -> dict[int, Tensor]:
    return fit_exits(config, make_samples(config.tuning.seq_length).train, init_parallel(config.parallel), 48).maps


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[int, Tensor]:
    return fitted_maps(fitting_job(model))


@pytest.mark.parametrize(
    ("tp", "pp", "cuts_sequence", "chunk"),
    [
        (2, 2, False, 0),
        (2, 2, True, 0),
        (1, 2, False, 0),
        (1, 1, False, 0),
        (2, 1, True, 0),
        (1, 4, False, 0),
        (2, 2, True, 4),
    ],
)
def test_every_layout_finds_the_maps_of_one_process(
    world: World,
    model: Path,
    alone: dict[int, Tensor],
    tmp_path: Path,
    tp: int,
    pp: int,
    cuts_sequence: bool,
    chunk: int,
) -> None:
    """Tokens counted by every shard or by the first replica alone, a part of the sequence beside another part's final
    states, final states of the micro-batch before, a map that one rank has and the others do not.
    """
    answers = world.run(fitted_maps, fitting_job(model, tp=tp, pp=pp, cuts_sequence=cuts_sequence, chunk=chunk))
    for layer in LAYERS:
        torch.testing.assert_close(
            answers[0][layer], alone[layer], rtol=1e-5, atol=1e-6, msg=f"the exit after layer {layer}"
        )
        assert all(torch.equal(answer[layer], answers[0][layer]) for answer in answers)


def test_every_layout_finds_the_map_of_low_rank(world: World, model: Path) -> None:
    """Sums of one rank's rows; a shape that other ranks do not wait for. Which factors make the product is any layout's
    own.
    """

    def product(maps: dict[int, Tensor]) -> Tensor:  # [h, h + 1]
        found = maps[6].double()
        return torch.cat((found[:, :7] @ found[:, 7:-1].T, found[:, -1:]), dim=1)

    config = fitting_job(model, tp=2, pp=2)
    alone, answers = (job.replace(each, exits={"output": "tied"}) for each in (fitting_job(model), config))
    found = world.run(fitted_maps, answers)
    assert found[0][6].shape == (48, 15)
    torch.testing.assert_close(product(found[0]), product(fitted_maps(alone)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(answer[layer], found[0][layer]) for answer in found for layer in LAYERS)


def fitted_row(config: Config) -> Tensor:
    listed = ListedTokens(token_ids=(0, 3, 5, 20, 21, 22, 24, 49, 100), num_tokens=1, num_listed=1)
    row = fit_exits(
        config, make_samples(config.tuning.seq_length).train, init_parallel(config.parallel), 48, listed
    ).other
    assert row is not None
    return row


def test_every_layout_finds_the_row_of_any_other_token(world: World, model: Path) -> None:
    """Sums of each tensor-parallel rank added up, or of the first replica alone; a list that lies on another rank."""
    wanted = fitted_row(fitting_job(model))
    for layout in ({"tp": 2, "pp": 2, "cuts_sequence": True}, {"tp": 2}):
        rows = world.run(fitted_row, fitting_job(model, **layout))  # type: ignore[arg-type]
        torch.testing.assert_close(rows[0], wanted, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(row, rows[0]) for row in rows)


def refused(config: Config) -> str:
    try:
        fitted_maps(job.replace(config, tuning={"fit_tokens": 24}))
    except InputError as error:
        return str(error)
    return ""


def test_all_ranks_refuse_too_few_tokens(world: World, model: Path) -> None:
    """A refusal on one rank alone would leave the others waiting for it."""
    assert len(set(world.run(refused, fitting_job(model, tp=2, pp=2)))) == 1
