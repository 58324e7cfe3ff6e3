"""Long work of one rank while the others wait for it."""
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from world import World

from ee_tuning.config import ParallelSection, load_config
from ee_tuning.evaluation.profile import with_exit_layers
from ee_tuning.parallel import together
from ee_tuning.parallel.together import finish_together
from ee_tuning.parallel.topology import init_parallel

MODEL = Path(__file__).parents[2] / "examples" / "tiny-python-llama"


def failing(rank: int) -> str:
    topology = init_parallel(ParallelSection())

    def steps() -> Iterator[None]:
        yield
        raise KeyError("a key")
    try:
        finish_together(steps() if topology.rank == rank else iter(()), topology)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_exception_that_nobody_expected_ends_every_rank(world: World) -> None:
    """The rank that meets it ends, and the others wait for it until a collective times out."""
    told = world.run(failing, 2)
    assert told[2] == "KeyError: 'a key'"
    assert told[:2] + told[3:] == ["RuntimeError: rank 2 failed: KeyError: 'a key'"] * 3


def profiled(text: str) -> tuple[object, int]:
    """The exits' layers, and how often this rank met the others for them."""
    config = load_config(None, {"model.path": str(MODEL), "exits.exit_layers": "auto:3:profile", "exits.profile_text": text})
    with (mock.patch.object(together, "_SECONDS_BETWEEN_ANSWERS", 0.0),
          mock.patch.object(dist, "all_gather_object", side_effect=dist.all_gather_object) as meeting):
        return with_exit_layers(config).exits.exit_layers, meeting.call_count


def test_ranks_that_wait_for_a_profile_hear_of_every_layer(world: World, tmp_path: Path) -> None:
    """A large model's walk takes longer than a collective may: the ranks that do not walk end the run."""
    (tmp_path / "text.py").write_text("def add(a, b):\n    return a + b\n" * 20)
    found = world.run(profiled, str(tmp_path / "text.py"))
    assert len({layers for layers, _ in found}) == 1 and len(found[0][0]) == 3
    assert all(count >= 12 for _, count in found)
