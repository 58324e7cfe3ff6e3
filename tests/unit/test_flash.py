"""FlashAttention is called as each release of torch wants it called; what the kernel itself does with it, `tests/gpu`
says.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ee_tuning.model import flash

ROWS = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
SEEN = torch.tensor([3, 1, 2], dtype=torch.int32)


def of_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    raise AssertionError("it has no scale")


def of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return query + (1 if window_size == (-1, 0) else 2)


def kernel(query: Tensor, *others: Any, scale: float, seqused_k: Tensor | None) -> tuple[Tensor]:
    assert len(others) == 9 and others[6] == 0.0 and scale == 0.125
    return (query + (10 if others[7] else 20 if seqused_k is None else 30),)


def called(monkeypatch: pytest.MonkeyPatch, function: Any, **options: Any) -> float:
    """Which function was called, and how."""
    monkeypatch.setattr(flash, "varlen_attn", lambda: function)
    monkeypatch.setattr(flash, "_KERNEL", kernel)
    query, keys = torch.zeros(3, 4, 8), torch.zeros(16, 2, 8)
    return flash.varlen_attention(query, keys, keys, ROWS, ROWS, 1, 3, scale=0.125, **options).unique().item()


def test_an_older_torch_gets_no_parameter_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents of a model with grouped queries, and every token decoded, ended in a TypeError under torch
    2.11.
    """
    assert called(monkeypatch, of_2_11, is_causal=True) == 1 and called(monkeypatch, of_2_11) == 2
    assert called(monkeypatch, of_2_11, seqused_k=SEEN) == 30
    for function in (of_2_10, None):
        assert called(monkeypatch, function, is_causal=True) == 10 and called(monkeypatch, function) == 20
        assert called(monkeypatch, function, seqused_k=SEEN) == 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_beneath_takes_these_arguments(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A stand-in that takes what the operator does not."""
    monkeypatch.setattr(flash, "varlen_attn", lambda: None)
    tensor: dict[str, Any] = {"device": "meta", "dtype": dtype}
    query, keys = torch.empty(3, 4, 64, **tensor), torch.empty(320, 2, 64, **tensor)
    rows, seen = ROWS.to("meta"), SEEN.to("meta")
    for options in ({"seqused_k": seen}, {"is_causal": True}):
        out = flash.varlen_attention(query, keys, keys, rows, rows, 1, 128, scale=0.125, **options)
        assert out.shape == query.shape and out.dtype == dtype


def test_a_card_that_is_too_old_or_too_wide_a_head_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents on a card without the kernel: an error in the first step and not the masked way."""

    class OnGpu:
        is_cuda, device, dtype, shape = True, None, torch.bfloat16, (4, 64)

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    like: Any = OnGpu()
    assert flash.serves(like) and flash.serves(like, "seqused_k") and not flash.serves(like, "no such parameter")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not flash.serves(like)
    assert (
        not flash.takes(torch.float32, 64)
        and not flash.takes(torch.bfloat16, 10)
        and not flash.takes(torch.bfloat16, 264)
    )
