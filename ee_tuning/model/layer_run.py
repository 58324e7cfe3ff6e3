"""A run of layers over the tokens of a pass: by a kernel or a CUDA graph where there is one, else layer by layer with
torch's operators.
"""

import ctypes
from collections.abc import Sequence
from functools import cache as made_once
from typing import Any

import torch
from torch import Tensor

from ee_tuning.kernel import calls
from ee_tuning.model import graphs
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_attention import LayerCache
from ee_tuning.model.ragged_layer import RaggedLayer
from ee_tuning.model.static_pass import COUNTS, StaticPass
from ee_tuning.model.token_pass import TokenPass

# t tokens of a pass · h hidden


class LayerRun:
    """`layers`, one after the other, each with its cache. Kernel and graphs serve passes of few tokens, which decoding
    mostly makes.
    """

    def __init__(self, layers: Sequence[RaggedLayer], caches: Sequence[LayerCache]):
        self._steps = list(zip(layers, caches, strict=True))
        self.native: ctypes.Array[calls.Layer] | None = None
        """The layers as the kernels take them; None where they do not serve."""
        if layers and all(layer.is_native for layer in layers):
            self.native = (calls.Layer * len(layers))(*(layer.native(cache) for layer, cache in self._steps))
            self.shape = layers[0].native_shape
        self._is_recordable = bool(layers) and all(layer.is_recordable for layer in layers)
        self._walk_layer = _compiled() if self._is_recordable and graphs.fuses() else RaggedLayer.__call__
        self._graphs: dict[StaticPass, graphs.Graph] = {}

    def __call__(self, hidden: Tensor, tokens: TokenPass) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        """The last layer's output, and what an `mlp` exit behind it takes (made on the way in any case), for use before
        the next call.
        """
        if self.native is not None and tokens.num_tokens <= calls.MOST_TOKENS:
            hidden, normed, residual = calls.run_layers(self.shape, self.native, tokens.native, hidden)
            return hidden, ExitInput(normed, residual=residual)
        if self._is_recordable and (static := tokens.static) is not None:
            return self._replayed(hidden, static)
        inner = ExitInput(hidden)
        for layer, cache in self._steps:
            hidden, inner = layer(hidden, cache, tokens.batch)
        return hidden, inner

    def prepare(self, tokens: TokenPass) -> None:
        """Has a pass told as this run wants it told; else its first call does that."""
        if self.native is not None and tokens.num_tokens <= calls.MOST_TOKENS:
            _ = tokens.native
        elif not self._is_recordable or tokens.static is None:
            _ = tokens.batch

    @torch.inference_mode()
    def _replayed(self, hidden: Tensor, static: StaticPass) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        if static not in self._graphs:
            self._graphs[static] = graphs.Graph(lambda: self._recorded(static), static.hidden.device)
        count = hidden.shape[0]
        static.hidden[:count] = hidden
        graph = self._graphs[static]
        graph.replay()
        out, normed, residual = (x[:count] for x in graph.outputs)
        # States wait at boundaries and travel to other stages while this run goes on with other tokens; a head is asked
        # at once.
        return out.clone(), ExitInput(normed, residual=residual)

    def _recorded(self, static: StaticPass) -> tuple[Tensor, Tensor, Tensor]:  # [padded t, h] each
        hidden, inner = static.hidden, ExitInput(static.hidden)
        # The first layer leaves its input alone, or padding would grow from one replay to the next; the last one leaves
        # what an exit takes.
        for number, (layer, cache) in enumerate(self._steps, 1):
            hidden, inner = self._walk_layer(layer, hidden, cache, static, keeps=number in (1, len(self._steps)))
        assert inner.residual is not None
        return hidden, inner.hidden, inner.residual


@made_once
def _compiled() -> Any:
    """Layers of one shape share what is compiled for a number of tokens; `keeps`, and attention of other lengths, take
    another one.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(COUNTS))
    return torch.compile(RaggedLayer.__call__, dynamic=False)
