"""CUDA graphs: a function over tensors at fixed addresses is captured once, and each later call is one replay.

Decoding moves so few numbers that a GPU would wait for Python between its kernels. The environment variable
EE_TUNING_GRAPHS=0 turns graphs off; EE_TUNING_GRAPHS=fused has torch.compile fuse a layer's small kernels before they
are captured, which takes seconds for each number of tokens.
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


def is_supported(topology: Topology) -> bool:
    """Whether this rank's layers can be captured: they are on a GPU, and so are the collectives within a layer
    (NCCL).
    """
    is_wanted = topology.device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"
    return is_wanted and (topology.tp == 1 or dist.get_backend(topology.tp_group) == "nccl")


def fuses() -> bool:
    """Whether layers are compiled before they are captured."""
    return os.environ.get(SWITCH) == "fused"


class Graph:
    """A captured function. Its inputs keep their addresses. It is warmed up once before the capture, on the inputs as
    they are then.
    """

    outputs: tuple[Tensor, ...]
    """The outputs of the last replay; the next one overwrites them."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]], device: torch.device, *, keeps: bool = True):
        """Captures `function`. Outputs last until the next replay: of this graph with `keeps`, else of any, which saves
        a copy.
        """
        stream = _stream(device)
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                made = function()  # libraries initialize at the first call, which can not be captured
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # In memory that no graph works in: a later graph may get the working memory of this one for its outputs.
            kept = tuple(torch.empty_like(x) for x in made) if keeps else ()
            # Other threads, such as NCCL's watchdog, may query the device meanwhile.
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
        """Runs the function on the present values of its inputs."""
        self._graph.replay()


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@cache
def _first_graph(device: torch.device) -> Any:
    """Returns a tiny graph whose memory pool all others share: graphs run one after the other, so the working memory of
    one is free for the next. It is never freed, because torch does not reuse a pool without graphs.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return graph
