"""A run of layers over the tokens of a pass: by a kernel where there is one, else layer by layer with torch's operators."""
import ctypes
from collections.abc import Sequence

from torch import Tensor

from ee_tuning.kernel import calls
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_attention import LayerCache
from ee_tuning.model.ragged_layer import RaggedLayer
from ee_tuning.model.token_pass import TokenPass

# t tokens of a pass · h hidden


class LayerRun:
    """`layers`, one after the other, each with its cache. The kernel serves passes of few tokens, which decoding mostly makes."""

    def __init__(self, layers: Sequence[RaggedLayer], caches: Sequence[LayerCache]):
        self._steps = list(zip(layers, caches, strict=True))
        self.native: ctypes.Array[calls.Layer] | None = None
        """For the kernels; None where they do not serve."""
        if layers and all(layer.is_native for layer in layers):
            self.native = (calls.Layer * len(layers))(*(layer.native(cache) for layer, cache in self._steps))
            self.shape = layers[0].native_shape

    def __call__(self, hidden: Tensor, tokens: TokenPass) -> tuple[Tensor, ExitInput]:  # [t, h] -> [t, h], …
        """The last layer's output, and what an `mlp` exit behind it takes (made on the way in any case)."""
        if self.native is not None and tokens.num_tokens <= calls.MOST_TOKENS:
            hidden, normed, residual = calls.run_layers(self.shape, self.native, tokens.native, hidden)
            return hidden, ExitInput(normed, residual=residual)
        inner = ExitInput(hidden)
        for layer, cache in self._steps:
            hidden, inner = layer(hidden, cache, tokens.batch)
        return hidden, inner

    def prepare(self, tokens: TokenPass) -> None:
        """Has a pass told as this run wants it told; else its first call does that."""
        _ = tokens.native if self.native is not None and tokens.num_tokens <= calls.MOST_TOKENS else tokens.batch
