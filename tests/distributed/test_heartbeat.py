"""Long work of one rank while the others wait for it."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from world import World

from ee_tuning.config import ParallelSection, load_config
from ee_tuning.evaluation.profile import with_exit_layers
from ee_tuning.parallel import collectives
from ee_tuning.parallel.collectives import on_first_rank, run_with_heartbeat
from ee_tuning.parallel.topology import init_parallel

MODEL = Path(__file__).parents[2] / "examples" / "tiny-python-llama"


def crash() -> Iterator[None]:
    yield
    raise KeyError("a key")


def failing(rank: int) -> list[str]:
    """What this rank hears where `rank` fails while all work, and where the first one fails at what it does for all."""
    topology, heard = init_parallel(ParallelSection()), []
    for work in (
        lambda: run_with_heartbeat(crash() if topology.rank == rank else iter(()), topology),
        lambda: on_first_rank(topology, lambda: list(crash())),
    ):
        try:
            work()
        except Exception as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard


def test_an_exception_that_nobody_expected_ends_every_rank(world: World) -> None:
    """The rank that meets it ends, and the others wait for it until a collective times out."""
    own, heard = "KeyError: 'a key'", "RuntimeError: rank {} failed: KeyError: 'a key'"
    assert world.run(failing, 2) == [
        [heard.format(2) if rank != 2 else own, heard.format(0) if rank else own] for rank in range(4)
    ]


def profiled(text: str) -> tuple[object, int]:
    """The exits' layers, and how often this rank met the others for them."""
    config = load_config(
        None, {"model.path": str(MODEL), "exits.exit_layers": "auto:3:profile", "exits.profile_text": text}
    )
    with (
        mock.patch.object(collectives, "_HEARTBEAT_SECONDS", 0.0),
        mock.patch.object(dist, "all_gather_object", side_effect=dist.all_gather_object) as meeting,
    ):
        return with_exit_layers(config).exits.exit_layers, meeting.call_count


def test_ranks_that_wait_for_a_profile_hear_of_every_layer(world: World, tmp_path: Path) -> None:
    """A large model's walk takes longer than a collective may: the ranks that do not walk end the run."""
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n" * 20)
    found = world.run(profiled, str(tmp_path / "text.py"))
    assert len({layers for layers, _ in found}) == 1 and len(found[0][0]) == 3
    assert all(count >= 12 for _, count in found)
