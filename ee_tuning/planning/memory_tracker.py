"""Tracks the costs of operations on fake tensors: bytes in use, floating-point operations, bytes sent.

Nothing is computed, and nothing here models the code: the tracker sees the operations that the real code calls.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # imported here, because torch's optimizers would import it while tensors are fake
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ee_tuning.planning.attention_flops import AttentionFlops, flops_if_attention

_READS_A_NUMBER = torch.ops.aten._local_scalar_dense.default
_READS_A_DEVICE = torch.ops.prim.device.default


class MemoryTracker(TorchDispatchMode):
    """Tracks operations while they are dispatched. If the code reads a value of a tensor, it gets 1.0, 0 or False."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "building"
        """The current phase, set by the caller. Memory and costs are attributed to it."""
        self.peak: Counter[str] = Counter()
        """Bytes in use at the peak, by category."""
        self.flops: Counter[str] = Counter()
        """Multiplications and additions of matrix products and attention, by phase. Of causal attention only the
        necessary half counts.
        """
        self.sent: Counter[tuple[str, str]] = Counter()
        """Bytes of collectives and messages by phase and process group. Where ranks hold parts of a tensor, the whole
        counts; an all-reduce counts twice, as a reduce-scatter and an all-gather.
        """
        self._blocks: dict[int, _Block] = {}
        self._live: Counter[str] = Counter()
        self._is_paused = False

    @contextmanager
    def account(self) -> Iterator["MemoryTracker"]:
        """Tracks operations, on fake tensors, while the context is open."""
        resize = torch.UntypedStorage.resize_

        # fully_shard allocates and frees whole weights in this way, which no operation shows.
        def resized(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._note(storage, "heads")
            return result

        imagine = ShardingPropagator._propagate_tensor_meta_non_cached

        def imagined(propagator: Any, schema: Any) -> Any:  # DTensor propagates whole shapes by fake tensors of its own
            self._is_paused = True
            try:
                return imagine(propagator, schema)
            finally:
                self._is_paused = False

        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(torch.UntypedStorage, "resize_", resized),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", imagined),
            self,
        ):
            yield self

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Attributes costs to `phase` while the context is open."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def reclassify(self, old: str, new: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Moves the memory in use of category `old`, or that of `tensors` only, to `new`."""
        keys = list(self._blocks) if tensors is None else [each.untyped_storage()._cdata for each in tensors]
        for key in keys:
            block = self._blocks[key]
            if block.kind == old:
                self._live[old] -= block.size
                self._live[new] += block.size
                self._blocks[key] = block._replace(kind=new)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's wrapper against its compiler costs time at each operation, and nothing is compiled here

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Tracks one operation."""
        if function is _READS_A_DEVICE and isinstance(args[0], FakeTensor):  # half of all that is dispatched
            return args[0].device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is dispatched again as operations on the DTensor's local tensor
        kwargs = kwargs or {}
        if function is _READS_A_NUMBER:
            return _a_number(args[0].dtype)
        result = function(*args, **kwargs)
        if self._is_paused:
            return result
        kind = _kind_of(function)
        if kind.rounds:
            self._note_traffic(args, kind.rounds)
        elif kind.flops is not None:
            self.flops[self.phase] += kind.flops(args, kwargs, result)
        for each in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(each, FakeTensor):
                self._note(each.untyped_storage(), self.phase)
        return result

    def _note(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._blocks.get(key)
        if known is None:
            self._blocks[key] = _Block(weakref.ref(storage, partial(self._freed, key)), size, kind)
            self._live[kind] += size
        elif known.size != size:
            self._blocks[key] = known._replace(size=size, kind=kind)
            self._live[known.kind] -= known.size
            self._live[kind] += size
        if self._live.total() >= self.peak.total():
            self.peak = self._live.copy()

    def _freed(self, key: int, reference: Any) -> None:
        known = self._blocks.get(key)
        if known is not None and known.reference is reference:  # otherwise the address belongs to a newer tensor
            self._live[known.kind] -= self._blocks.pop(key).size

    def _note_traffic(self, args: Any, rounds: int) -> None:
        scripted = [each for each in args if isinstance(each, torch.ScriptObject)]
        groups = [each for each in scripted if each._type().name() == "ProcessGroup"]  # type: ignore[attr-defined]
        if groups:
            group = dist.ProcessGroup.unbox(groups[0])
            size = max((each.nbytes for each in tree_leaves(args) if isinstance(each, Tensor)), default=0)
            self.sent[self.phase, group.group_name] += rounds * size


class _Block(NamedTuple):
    """A block of memory in use."""

    reference: Any
    size: int
    kind: str


class _Operation(NamedTuple):
    """The costs of an operation beside memory."""

    rounds: int
    """Times that a collective passes its tensor on; 0 of other operations."""
    flops: Callable[[Any, dict[str, Any], Any], int] | None
    """Floating-point operations by positional arguments, named ones and the result; None where it has none."""


@functools.cache
def _kind_of(function: Any) -> _Operation:
    name = function._schema.name
    if function.namespace == "c10d":
        return _Operation(2 if "allreduce" in name else 1, None)
    if (flops := flops_if_attention(name)) is not None:
        names = [each.name for each in function._schema.arguments]
        return _Operation(0, partial(_counted_by_name, flops, names))
    count = flop_registry.get(function._overloadpacket)
    return _Operation(0, None if count is None else partial(_counted, count))


def _counted_by_name(flops: AttentionFlops, names: list[str], args: Any, kwargs: dict[str, Any], result: Any) -> int:
    return flops({**dict(zip(names, args, strict=False)), **kwargs})


def _counted(count: Callable[..., int], args: Any, kwargs: dict[str, Any], result: Any) -> int:
    return count(*args, **kwargs, out_val=result)


def _a_number(dtype: torch.dtype) -> bool | float | int:
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
