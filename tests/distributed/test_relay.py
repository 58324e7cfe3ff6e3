"""The relay between four stages: order, content, the end of a run, and that nobody waits who need not."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from meeting import LONG, SHORT, Meeting
from world import World

from ee_tuning.config import ParallelSection
from ee_tuning.parallel import p2p
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology, init_parallel

SHAPE = (3, 2, 4)  # [s, b, h]


def relay_all(topology: Topology, num_microbatches: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What this stage held of every micro-batch; each stage adds one before it sends on."""
    relay = Relay(topology, SHAPE, dtype)
    seen = []
    next_action = NextAction.NEXT
    while next_action is not NextAction.END:
        if topology.is_first_stage:
            hidden = torch.full(SHAPE, 10.0 * len(seen), dtype=dtype)
            next_action = NextAction.NEXT if len(seen) < num_microbatches - 1 else NextAction.END
        else:
            hidden, next_action = relay.receive()
        seen.append(hidden)
        if not topology.is_last_stage:
            relay.send(hidden + 1, next_action=next_action)
    relay.finish()
    return seen


def relay_on_every_stage(num_microbatches: int, dtype: torch.dtype, max_in_flight: int) -> list[torch.Tensor]:
    with mock.patch("ee_tuning.parallel.relay.MAX_IN_FLIGHT", max_in_flight):
        return relay_all(init_parallel(ParallelSection(pipeline_model_parallel_size=4)), num_microbatches, dtype)


@pytest.mark.parametrize(
    ("num_microbatches", "dtype", "max_in_flight"),
    [(17, torch.float32, 2), (17, torch.bfloat16, 1), (1, torch.float32, 2), (5, torch.float64, 100)],
)
def test_every_stage_sees_every_microbatch_in_order(
    world: World, num_microbatches: int, dtype: torch.dtype, max_in_flight: int
) -> None:
    """A receive posted ahead into a buffer still being read, or matched with another send, would change what a stage
    sees.
    """
    for stage, seen in enumerate(world.run(relay_on_every_stage, num_microbatches, dtype, max_in_flight)):
        wanted = [torch.full(SHAPE, 10.0 * i + stage, dtype=dtype) for i in range(num_microbatches)]
        assert len(seen) == num_microbatches
        for got, expected in zip(seen, wanted, strict=True):
            assert torch.equal(got, expected)


def relay_staged(num_microbatches: int) -> list[torch.Tensor]:
    with mock.patch.object(p2p, "_is_staged", lambda tensor, group: tensor.is_floating_point()):
        return relay_on_every_stage(num_microbatches, torch.bfloat16, 2)


def test_states_that_go_through_host_memory_arrive_in_order(world: World) -> None:
    """What processes on one GPU have: a copy taken before the states were there, or put where the receiver does not
    look.
    """
    for stage, seen in enumerate(world.run(relay_staged, 9)):
        assert [each.unique().item() for each in seen] == [10.0 * i + stage for i in range(9)]


def relay_with_saves(num_microbatches: int) -> list[tuple[float, NextAction]]:
    """A checkpoint follows each third micro-batch: what this stage held of every one, and what it heard."""
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=4))
    relay = Relay(topology, SHAPE, torch.float32)
    seen = []
    for i in range(num_microbatches):
        next_action = (
            NextAction.END if i == num_microbatches - 1 else NextAction.SAVE if i % 3 == 2 else NextAction.NEXT
        )
        hidden = torch.full(SHAPE, 10.0 * i)
        if not topology.is_first_stage:
            hidden, next_action = relay.receive()
        seen.append((hidden.mean().item(), next_action))
        if not topology.is_last_stage:
            relay.send(hidden + 1, next_action=next_action)
    relay.finish()
    return seen


def test_every_stage_hears_where_a_checkpoint_is_taken(world: World) -> None:
    """A stage that saves after another micro-batch than the first one, or takes a checkpoint for the end."""
    words = [NextAction.NEXT, NextAction.NEXT, NextAction.SAVE] * 3 + [NextAction.END]
    for stage, seen in enumerate(world.run(relay_with_saves, 10)):
        assert seen == [(10.0 * i + stage, word) for i, word in enumerate(words)]


def relay_twice() -> int:
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=2, tensor_model_parallel_size=2))
    first = relay_all(topology, 3, torch.float32)
    second = relay_all(topology, 4, torch.float32)
    return len(first) + len(second)


def test_a_second_run_follows_the_first_on_the_same_groups(world: World) -> None:
    """A receive that nobody answers, left behind by a run that stopped, would swallow the first micro-batch of the
    next.
    """
    assert world.run(relay_twice) == [7, 7, 7, 7]


def all_met(folder: Path, patience: float, drains: bool) -> bool:
    """Whether this stage saw all others at work with each of its micro-batches, 2 of which are a step."""
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=4))
    relay, num_microbatches = Relay(topology, SHAPE, torch.float32), 20
    meeting = Meeting(folder, topology.stage, topology.pp, num_microbatches, patience)
    work = meeting.at_work(lambda hidden: hidden + 1)
    for i in range(num_microbatches):
        hidden = work(torch.zeros(SHAPE) if topology.is_first_stage else relay.receive().hidden)
        if not topology.is_last_stage:
            relay.send(hidden, next_action=NextAction.NEXT if i < num_microbatches - 1 else NextAction.END)
        if drains and i % 2:
            topology.barrier()
    relay.finish()
    return meeting.all_met


def test_all_stages_work_at_once_but_where_they_drain(world: World, tmp_path: Path) -> None:
    """Any wait for a later stage, within a step or between steps, would come back as the bubble the relay is there to
    avoid.
    """
    for drains, patience in ((False, LONG), (True, SHORT)):
        (folder := tmp_path / str(drains)).mkdir()
        met = world.run(all_met, folder, patience, drains)
        assert not any(met[1:]) if drains else all(met), (
            "the first stage, when it is late, finds that the others waited no longer"
        )


def fail_on_rank_two() -> None:
    if init_parallel(ParallelSection()).rank == 2:
        raise RuntimeError("rank two is out of order")


def test_a_failing_rank_is_reported_with_its_traceback_and_the_world_recovers(world: World) -> None:
    """A harness that swallows a rank's exception would pass every test."""
    with pytest.raises(AssertionError, match=r"rank 2 of 4 failed(.|\n)*fail_on_rank_two(.|\n)*out of order"):
        world.run(fail_on_rank_two)
    assert world.run(relay_twice) == [7, 7, 7, 7]
