"""Conversion by several processes."""

from pathlib import Path

import pytest
from random_models import random_llama
from world import World

from ee_tuning import config as job
from ee_tuning.artifact.convert import convert, write_initial_exits
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import init_parallel


def _convert(config: Config, output: str) -> str | None:
    """The message of the InputError that this rank ended with."""
    topology = init_parallel(config.parallel)
    try:
        write_initial_exits(config, Path(output), topology)
        with ExitHeadsReader(Path(output), topology) as reader:
            reader.names()
    except InputError as error:
        return str(error)
    return None


def _open(config: Config, folder: str) -> str | None:
    topology = init_parallel(config.parallel)
    try:
        ExitHeadsReader(Path(folder), topology)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("init", ["copy", "random"])
def test_every_layout_writes_the_same_bytes(world: World, tmp_path: Path, init: str) -> None:
    """Tensors drawn or written by rank would depend on how many ranks there are."""
    random_llama(tmp_path / "llama")
    written = []
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        config = job.replace(
            Config(),
            model={"path": str(tmp_path / "llama")},
            exits={"exit_layers": (1, 5), "init": init},
            parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        )
        output = tmp_path / f"tp{tp}-pp{pp}"
        assert world.run(_convert, config, str(output)) == [None] * 4
        written.append({path.name: path.read_bytes() for path in output.iterdir()})
    alone = tmp_path / "alone"
    convert(job.replace(config, parallel={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}), alone)
    assert all(files == {path.name: path.read_bytes() for path in alone.iterdir()} for files in written)


def test_what_one_rank_finds_wrong_all_ranks_refuse(world: World, tmp_path: Path) -> None:
    """A refusal on one rank alone would leave the others waiting for it."""
    random_llama(tmp_path / "llama")
    config = job.replace(Config(), model={"path": str(tmp_path / "llama")}, exits={"exit_layers": (3,)})
    output = tmp_path / "exits"
    assert world.run(_convert, config, str(output)) == [None] * 4
    messages = world.run(_convert, config, str(output))
    assert len(set(messages)) == 1 and "exists already" in messages[0]

    path = output / "exit_heads.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)
    messages = world.run(_open, config, str(output))
    assert len(set(messages)) == 1 and str(path) in messages[0]
