"""A rank that waits long says for whom, and one that gave up does, too."""
import io
import time
from contextlib import redirect_stderr
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from world import World

from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.parallel import waiting
from ee_tuning.parallel.relay import Follows, Relay
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.parallel.waiting import waiting_for

SHAPE = (3, 2, 4)
PLACE: Any = SimpleNamespace(rank=5, stage=2, tp_rank=1, dp_rank=0)


def slow_first_stage() -> tuple[str, timedelta]:
    """What a rank prints while the first stage takes its time; when its relay's group gives up."""
    with mock.patch.object(waiting, "PATIENCE", 0.2), redirect_stderr(io.StringIO()) as said:
        topology = init_parallel(ParallelSection(pipeline_model_parallel_size=4, distributed_timeout_minutes=7))
        relay, hidden = Relay(topology, SHAPE, torch.float32), torch.zeros(SHAPE)
        if topology.is_first_stage:
            time.sleep(3.0)
        else:
            hidden, _ = relay.receive()
        if not topology.is_last_stage:
            relay.send(hidden, follows=Follows.END)
        relay.finish()
    return said.getvalue(), topology.pp_control._get_backend(torch.device("cpu")).options._timeout


def test_a_rank_says_for_whom_it_waits(world: World) -> None:
    """A hang of which nobody can tell which rank began it; a time-out that is asked for and not set."""
    said, timeouts = zip(*world.run(slow_first_stage), strict=True)
    for rank in (1, 2, 3):
        assert f"rank {rank} (stage {rank}, tensor 0, replica 0) has waited" in said[rank], said[rank]
        assert f"for micro-batch 1 from stage {rank - 1} (rank {rank - 1})\n" in said[rank]
        assert said[rank].count("has waited") <= 3, "told at a fixed pace, it would fill the log"
    assert "micro-batch 1 from" not in said[0]
    assert set(timeouts) == {timedelta(minutes=7)}


def test_a_wait_in_vain_names_what_was_waited_for() -> None:
    """gloo's own words, which name a line of its source."""
    told = r"^rank 5 \(stage 2, tensor 1, replica 0\) waited 0 s for micro-batch 3, in vain: .*Timed out"
    with pytest.raises(RuntimeError, match=told), waiting_for(PLACE, "micro-batch 3"):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv\nmore")
    with pytest.raises(RuntimeError, match=r"^shapes differ"), waiting_for(PLACE, "the layers"):
        raise RuntimeError("shapes differ")


def test_a_time_out_of_no_time_is_refused() -> None:
    """Every wait would end at once."""
    with pytest.raises(InputError, match="distributed_timeout_minutes must be above 0"):
        init_parallel(ParallelSection(distributed_timeout_minutes=0.0))
