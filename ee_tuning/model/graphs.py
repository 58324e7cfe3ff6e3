"""CUDA graphs: a function over tensors that stay where they are is recorded once, and is one call from then on.

Decoding moves so few numbers that a GPU would wait for Python between its kernels. The environment variable
EE_TUNING_GRAPHS=0 asks for them one by one; EE_TUNING_GRAPHS=fused has torch.compile join a layer's small kernels
before they are recorded, which takes seconds for each number of tokens.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.parallel.topology import Topology

SWITCH = "EE_TUNING_GRAPHS"


def serve(topology: Topology) -> bool:
    """Whether what this rank decodes with can be recorded: on a GPU, and collectives within a layer are the GPU's own
    work.
    """
    is_wanted = topology.device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"
    return is_wanted and (topology.tp == 1 or dist.get_backend(topology.tp_group) == "nccl")


def fuses() -> bool:
    """Whether layers are to be compiled before they are recorded."""
    return os.environ.get(SWITCH) == "fused"


class Graph:
    """`function` as it was recorded, once. What it reads has to stay where it is; it also runs once beforehand,
    whatever is there by then.
    """

    outputs: tuple[Tensor, ...]
    """Where every replay leaves them, over those of the replay before."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]], device: torch.device, *, keeps: bool = True):
        """`keeps`: outputs stay as they are until the next replay; without, until another graph's: that saves a copy of
        them.
        """
        stream = _stream(device)
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                made = function()  # libraries make themselves ready at the first call, which can not be recorded
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # In memory that no graph works in: what is recorded later may get what this one works in for its outputs.
            kept = tuple(torch.empty_like(x) for x in made) if keeps else ()
            # Other threads, NCCL's watchdog for one, may ask the device something meanwhile.
            with torch.cuda.graph(
                self._graph, pool=_first_graph(device).pool(), stream=stream, capture_error_mode="thread_local"
            ):
                made = function()
                for place, output in zip(kept, made, strict=False):
                    place.copy_(output)
            self.outputs = kept or made
        except RuntimeError as error:
            error.add_note(f"while a CUDA graph was recorded; {SWITCH}=0 decodes without")
            raise

    def replay(self) -> None:
        """The function once more, on what its inputs are now."""
        self._graph.replay()


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@cache
def _first_graph(device: torch.device) -> Any:
    """A graph of next to nothing, in whose memory all others are recorded: they run one after the other, and what one
    holds in between is room for the next. It stays: torch takes no memory up again that every graph has left.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return graph
