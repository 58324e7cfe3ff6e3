"""Graphs without a GPU: what would be recorded is called again, and its outputs lie where the first call left them, as
a graph's do.

All graphs work in the same memory: what one was recorded to leave there is written over by those that were recorded
before it.
"""

import math
import weakref
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ee_tuning.decoding import captured_attention, graphs
from ee_tuning.kernel import calls
from ee_tuning.model import flash


class ImitatedGraph:
    """Takes the place of graphs.Graph."""

    num_replays = 0
    recorded: ClassVar[list[weakref.ref["ImitatedGraph"]]] = []

    def __init__(self, function: Callable[[], tuple[Tensor, ...]], device: torch.device, *, keeps: bool = True):
        self._function, self._keeps = function, keeps
        function()
        self.outputs = tuple(output.clone() for output in function())
        self._place = len(ImitatedGraph.recorded)
        ImitatedGraph.recorded.append(weakref.ref(self))

    def replay(self) -> None:
        ImitatedGraph.num_replays += 1
        for kept, new in zip(self.outputs, self._function(), strict=True):
            kept.copy_(new)
        for other in [ref() for ref in ImitatedGraph.recorded[self._place + 1 :]]:
            if other is not None and not other._keeps:
                for output in other.outputs:
                    output.fill_(torch.nan if output.is_floating_point() else 0)


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets engines that are made from now on decode as on a GPU."""
    monkeypatch.setattr(graphs, "is_supported", lambda topology: True)
    monkeypatch.setattr(graphs, "Graph", ImitatedGraph)
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    ImitatedGraph.num_replays = 0
    ImitatedGraph.recorded.clear()


def imitate_flash_attention(monkeypatch: pytest.MonkeyPatch, *, version: int) -> None:
    """Lets the CPU take attention that wants a GPU, by a kernel that keeps to what FlashAttention of this version
    promises.
    """
    monkeypatch.setattr(flash, "varlen_attention", _varlen if version == 2 else _paged)
    way = captured_attention.VarlenAttention if version == 2 else captured_attention.PagedAttention
    monkeypatch.setattr(way, "is_there", staticmethod(lambda like: True))


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    seqused_k: Tensor,
) -> Tensor:
    """Row i's keys are the seqused_k[i] ones from cu_seq_k[i] on; nothing else of cu_seq_k is read."""
    _check(query, key, value, cu_seq_q, seqused_k, max_q, max_k)
    assert (
        cu_seq_k.dtype == torch.int32
        and cu_seq_k.is_contiguous()
        and cu_seq_k.shape == cu_seq_q.shape
        and key.dim() == 3
    )
    firsts = cu_seq_k.tolist()
    return torch.cat(
        [
            _attend(q, key[first : first + seen], value[first : first + seen], scale)
            for q, first, seen in zip(query, firsts[:-1], seqused_k.tolist(), strict=True)
        ]
    )


def _paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """Row i's keys are the first seqused_k[i] ones of the pages that block_table[i] names."""
    _check(query, key, value, cu_seq_q, seqused_k, max_q, max_k)
    assert cu_seq_k is None and block_table.dtype == torch.int32 and block_table.is_contiguous() and key.dim() == 4
    assert block_table.shape[1] * key.shape[1] >= max_k
    return torch.cat(
        [
            _attend(q, key[pages].flatten(0, 1)[:seen], value[pages].flatten(0, 1)[:seen], scale)
            for q, pages, seen in zip(query, block_table, seqused_k.tolist(), strict=True)
        ]
    )


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, seqused_k: Tensor, max_q: int, max_k: int
) -> None:
    rows = query.shape[0]
    assert query.dim() == 3 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1 and max_q == 1
    assert query.shape[1] % key.shape[-2] == 0
    assert cu_seq_q.dtype == seqused_k.dtype == torch.int32 and cu_seq_q.is_contiguous() and seqused_k.is_contiguous()
    assert cu_seq_q.tolist() == list(range(rows + 1)) and seqused_k.shape == (rows,)
    assert int(seqused_k.min()) >= 1 and int(seqused_k.max()) <= max_k


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:  # [n, d], [c, g, d] -> [1, n, d]
    grouped = query.view(keys.shape[1], -1, query.shape[-1])
    assert math.isfinite(scale)
    return (
        (torch.einsum("grd,cgd->grc", grouped, keys) * scale)
        .softmax(-1)
        .matmul(values.transpose(0, 1))
        .reshape(1, *query.shape)
    )
