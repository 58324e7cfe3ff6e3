"""Graphs on every rank of a layout, as on GPUs with NCCL between them, say what one process says without; without a GPU
(recorded.py).
"""

from typing import Any

import pytest
from exits import write_exits
from random_models import random_llama
from recorded import ImitatedGraph, record_on_cpu
from test_decoding_layouts import decode_at


def recorded_at(model: str, exits: str, tp: int, pp: int) -> tuple[Any, int]:
    """What is decoded, and how many graphs were replayed for it on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        record_on_cpu(patch)
        return decode_at(model, exits, tp, pp), ImitatedGraph.num_replays


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Any]:
    """A model, its exits, and what one process decodes."""
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)
    model, exits = str(folder / "model"), str(write_exits(folder / "model", folder / "exits"))
    return model, exits, decode_at(model, exits, 1, 1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_recorded_layouts_decode_the_same(world: Any, subject: tuple[str, str, Any], tp: int, pp: int) -> None:
    """A shard's answer taken for the whole vocabulary's, states overwritten while they travel, a graph that one rank
    alone makes.
    """
    model, exits, wanted = *subject[:2], list(subject[2])
    if pp > 1:  # see test_decoding_layouts.py
        wanted[-3] = [(output, []) for output, _ in wanted[-3]]
    for answer, num_replays in world.run(recorded_at, model, exits, tp, pp):
        assert answer == wanted and num_replays > 500
