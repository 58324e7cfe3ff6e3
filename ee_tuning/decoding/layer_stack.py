"""Consecutive layers over a batch of tokens: by a CPU kernel or a CUDA graph where there is one, else layer by layer
with torch's operators.
"""

import ctypes
from collections.abc import Sequence
from functools import cache as made_once
from typing import Any

import torch
from torch import Tensor

from ee_tuning.decoding import graphs
from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.captured_batch import COUNTS, CapturedBatch
from ee_tuning.decoding.decode_layer import DecodeLayer
from ee_tuning.decoding.eager_attention import LayerCache
from ee_tuning.kernel import calls
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.time_parts import part

# t tokens of a pass · h hidden


class LayerStack:
    """Layers, each with its KV cache. Kernels and graphs serve the passes of few tokens that decoding makes."""

    def __init__(self, layers: Sequence[DecodeLayer], caches: Sequence[LayerCache]):
        self._steps = list(zip(layers, caches, strict=True))
        self.native: ctypes.Array[calls.Layer] | None = None
        """The layers for the CPU kernels; None where these do not support them."""
        if layers and all(layer.is_native for layer in layers):
            self.native = (calls.Layer * len(layers))(*(layer.native(cache) for layer, cache in self._steps))
            self.shape = layers[0].native_shape
        self._is_recordable = bool(layers) and all(layer.is_recordable for layer in layers)
        self._run_layer = _compiled() if self._is_recordable and graphs.fuses() else DecodeLayer.__call__
        self._graphs: dict[CapturedBatch, graphs.Graph] = {}

    @part("layers, the rest")
    def __call__(self, hidden: Tensor, tokens: AttentionMetadata) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        """Returns the last layer's output and the input of an `mlp` exit behind it, for use before the next call."""
        if self.native is not None and tokens.num_tokens <= calls.MOST_TOKENS:
            hidden, normed, residual = calls.run_layers(self.shape, self.native, tokens.native, hidden)
            return hidden, ExitInput(normed, residual=residual)
        if self._is_recordable and (captured := tokens.captured) is not None:
            return self._replayed(hidden, captured)
        inner = ExitInput(hidden)
        for layer, cache in self._steps:
            hidden, inner = layer(hidden, cache, tokens.eager)
        return hidden, inner

    @torch.inference_mode()
    def _replayed(self, hidden: Tensor, captured: CapturedBatch) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        if captured not in self._graphs:
            self._graphs[captured] = graphs.Graph(lambda: self._recorded(captured), captured.hidden.device)
        count = hidden.shape[0]
        captured.hidden[:count] = hidden
        graph = self._graphs[captured]
        graph.replay()
        out, normed, residual = (x[:count] for x in graph.outputs)
        # The states may be sent to another stage, or become pending, after these layers have run again; a head is asked
        # before.
        return out.clone(), ExitInput(normed, residual=residual)

    def _recorded(self, captured: CapturedBatch) -> tuple[Tensor, Tensor, Tensor]:  # [padded t, h] each
        hidden, inner = captured.hidden, ExitInput(captured.hidden)
        # The first layer must not overwrite its input, or padding would grow from one replay to the next; the last one
        # keeps the input of an exit.
        for number, (layer, cache) in enumerate(self._steps, 1):
            hidden, inner = self._run_layer(layer, hidden, cache, captured, keeps=number in (1, len(self._steps)))
        assert inner.residual is not None
        return hidden, inner.hidden, inner.residual


@made_once
def _compiled() -> Any:
    """Returns the compiled layer. Layers of one shape share it for each number of tokens, reach of attention and
    `keeps`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(COUNTS))
    return torch.compile(DecodeLayer.__call__, dynamic=False)
