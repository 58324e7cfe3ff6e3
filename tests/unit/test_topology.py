"""Worlds without a launcher, and what is inherited from a shell."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import connection_warning, destroy_parallel, init_parallel


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
