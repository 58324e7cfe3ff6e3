"""What a machine without CUDA gets done to its torch must not be felt by other libraries; and what one with CUDA
gets.
"""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from ee_tuning import notices
from ee_tuning.artifact.stage_plans import compute_dtype
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.parallel.device import collective_backend
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.topology import init_parallel

CHECK = """
import torch
from ee_tuning.parallel.device import prepare_device
prepare_device()
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.tensor([1.0])]
print(*{tensor.device.type for tensor in made})
"""


def test_device_contexts_still_reach_the_adapted_factories():
    """transformers builds models in such a context; one loaded after our own had rotary frequencies of uninitialized
    memory.
    """
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["meta"]


def test_what_goes_to_a_gpu_is_pinned_first() -> None:
    """The host waits for all that is queued whenever it copies from memory that may be paged: at every micro-batch,
    three times.
    """
    x = mock.MagicMock()
    assert to_device(x, torch.device("cuda")) is x.pin_memory.return_value.to.return_value
    x.pin_memory.return_value.to.assert_called_once_with(torch.device("cuda"), non_blocking=True)
    assert to_device(y := torch.ones(2), torch.device("cpu")) is y


@pytest.mark.parametrize(("here", "backend"), [("", "nccl"), ("2", "nccl"), ("3", "gloo")])
def test_more_processes_than_gpus_talk_over_gloo(monkeypatch: pytest.MonkeyPatch, here: str, backend: str) -> None:
    """A layout tried on one card ends in NCCL's complaint about a duplicate GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert collective_backend() == backend


def test_bfloat16_on_a_processor_without_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuning at a tenth of the speed, and nothing that says why; or a warning where the processor can do it."""
    topology = init_parallel(ParallelSection())
    monkeypatch.setattr(notices, "_shown_lines", set())
    for told, warnings in (
        ({"architecture": "x86_64", "avx512_bf16": True}, 0),
        ({"architecture": "aarch64"}, 0),
        ({"architecture": "x86_64"}, 1),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        for dtype in ("float32", "bfloat16"):
            assert compute_dtype(load_config(None, {"model.dtype": dtype}), topology) == getattr(torch, dtype)
        assert capsys.readouterr().err.count("no instructions for bfloat16") == warnings
