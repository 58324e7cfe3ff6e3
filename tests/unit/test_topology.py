"""Worlds without a launcher, and what is inherited from a shell."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import (
    connection_warning,
    destroy_parallel,
    init_parallel,
    restart_warning,
    store_of_this_attempt,
)


@pytest.fixture
def no_world() -> None:
    if dist.is_initialized():  # of another test
        destroy_parallel()


def test_a_world_size_without_a_rank_is_a_world_of_one(no_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE left in a container's environment: half an hour of waiting for processes that nobody started."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    for _ in range(2):  # a world that was left can be joined anew
        topology = init_parallel(ParallelSection(distributed_timeout_minutes=0.1))
        assert (topology.world_size, topology.rank, topology.dp) == (1, 0, 1)
        ones = torch.ones(2)
        for group in (topology.tp_group, topology.dp_group, topology.stage_control, topology.world_control):
            dist.all_reduce(ones, group=group)
        topology.barrier()
        assert topology.broadcast_object({"a": 1}) == {"a": 1} and ones.tolist() == [1.0, 1.0]
        destroy_parallel()


@pytest.mark.parametrize(
    ("device", "pp", "connections", "warns"),
    [
        ("cuda", 2, "1", True),
        ("cuda", 2, None, False),
        ("cuda", 2, "8", False),
        ("cuda", 1, "1", False),
        ("cpu", 2, "1", False),
    ],
)
def test_one_queue_for_all_of_a_gpus_work_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, device: str, pp: int, connections: str | None, warns: bool
) -> None:
    """Megatron's launch scripts export CUDA_DEVICE_MAX_CONNECTIONS=1, under which a receive posted ahead stops the
    layers behind it.
    """
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    topology = dataclasses.replace(init_parallel(ParallelSection()), device=torch.device(device), pp=pp)
    warning = connection_warning(topology)
    assert (warning is not None) == warns
    assert warning is None or ("unset" in warning and "\n" not in warning)


def test_a_world_of_one_needs_no_address(no_world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK=0 WORLD_SIZE=1, as notebooks and some launchers set them: torch wants MASTER_ADDR for nobody to come to."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert init_parallel(ParallelSection(distributed_timeout_minutes=0.1)).world_size == 1
    destroy_parallel()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="MASTER_ADDR"):
        init_parallel(ParallelSection(tensor_model_parallel_size=2))


@pytest.mark.parametrize(
    ("shares", "restarts", "nodes", "warns"),
    [("True", "2", "2", True), ("False", "2", "2", False), ("True", "0", "2", False), ("True", "2", "1", False)],
)
def test_restarts_that_torchrun_can_not_carry_out_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, shares: str, restarts: str, nodes: str, warns: bool
) -> None:
    """--max-restarts over nodes, relied on for days: the first lost node ends the run, since torchrun's own store is
    announced once.
    """
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    warning = restart_warning()
    assert (warning is not None) == warns
    assert warning is None or ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warning and "\n" not in warning)


def test_a_store_of_the_workers_own_has_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that takes a lost one's place counts its restarts from 0: under prefixes by that count its workers and the
    others would wait for each other.
    """
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for shares, wanted in (("True", "attempt_1/"), ("False", "")):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares)
        store = dist.HashStore()
        store_of_this_attempt(store).set("key", "value")
        assert store.check([f"{wanted}key"])
