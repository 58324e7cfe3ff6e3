"""Heads for decoding, the exits' and the model's own: from the states of a pass to logits, and to the likeliest
tokens.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.decoding import graphs
from ee_tuning.decoding.captured_batch import padded_count
from ee_tuning.decoding.column_major import column_major, row_major
from ee_tuning.decoding.decode_layer import DecodeLayer, native_shape
from ee_tuning.kernel import calls
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import (
    AdapterHead,
    EmbeddingHead,
    ExitHead,
    ExitInput,
    ExitMLP,
    LayerHead,
    MLPHead,
    NormHead,
)
from ee_tuning.parallel.shortlist import Shortlist, token_top1
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.vocab import VocabShard

# t tokens of a pass · q of them that a head is evaluated on · h hidden · v/tp a shard of the vocabulary, or of a
# shortlist's classes


class DecodeHead(ABC):
    """A head on this rank. Shares its weights."""

    layer: DecodeLayer | None = None
    """The head's own layer, behind the backbone's."""

    def __init__(self, model: EarlyExitModel, vocab: VocabShard, norm: Any, output: Tensor, mlp: ExitMLP | None = None):
        """Creates the head. `vocab` describes the rows of `output`."""
        self.vocab = vocab
        is_native = model.topology.tp == 1 and calls.serves(output)
        if mlp is not None:
            (row_major if is_native else column_major)(mlp.fc1.weight)
        self.native = _native(norm, output, mlp, vocab) if is_native else None
        """The head as the kernels take it; None where they do not support it."""
        self._shape = native_shape(model.config)
        self._is_recordable = graphs.is_supported(model.topology)
        self._graphs: dict[int, tuple[ExitInput, graphs.Graph]] = {}
        """Graphs by padded count, each with its inputs."""

    @property
    def is_fully_native(self) -> bool:
        """Whether the kernels run a token all the way from the layers before the head to its answer."""
        return self.native is not None

    def ask(self, inputs: ExitInput) -> tuple[Tensor, Tensor]:  # [q, v/tp]; [q, 2] float64
        """Returns logits of the requested tokens and, on the CPU, the likeliest id of each over the whole vocabulary
        and its probability; for a shortlist as `token_top1` returns them. Use the result before the next call of a head
        or of layers.
        """
        if self.native is not None and inputs.hidden.shape[0] <= calls.MOST_TOKENS:
            return calls.run_head(self._shape, self.native, *self.native_states(inputs))
        logits, top = self._replayed(inputs) if self._is_recordable else self._answer(inputs)
        return logits, top.cpu()

    @torch.inference_mode()
    def _replayed(self, inputs: ExitInput) -> tuple[Tensor, Tensor]:  # [q, v/tp]; [q, 2] float64
        asked = inputs.hidden.shape[0]
        if (count := padded_count(asked)) is None:
            return self._answer(inputs)
        if count not in self._graphs:
            taken = inputs.padded(count)
            self._graphs[count] = taken, graphs.Graph(lambda: self._answer(taken), inputs.hidden.device, keeps=False)
        taken, graph = self._graphs[count]
        taken.overwrite(inputs)
        graph.replay()
        logits, top = graph.outputs
        return logits[:asked], top[:asked]

    def _answer(self, inputs: ExitInput) -> tuple[Tensor, Tensor]:  # [q, v/tp]; [q, 2] float64
        logits = self.logits(inputs)
        ids, probabilities = token_top1(logits, self.vocab)
        return logits, torch.stack((ids.double(), probabilities.double()), dim=-1)

    @abstractmethod
    def logits(self, inputs: ExitInput) -> Tensor:  # [q, v/tp]
        """Returns the logits, by torch's operators."""

    @abstractmethod
    def native_states(self, inputs: ExitInput) -> tuple[Tensor, Tensor | None]:  # [q, h] each
        """Returns the kernel's inputs: states, and the addend of the MLP's output, if any."""


class DecodeFinalHead(DecodeHead):
    """The model's own last norm and output matrix."""

    def __init__(self, model: EarlyExitModel):
        self.model = model
        super().__init__(
            model, model.vocab, model.backbone.decoder["final_layernorm"], model.backbone.output_layer.weight
        )

    def logits(self, inputs: ExitInput) -> Tensor:  # [q, v/tp]
        return F.linear(self.model.final_hidden(inputs.hidden), self.model.backbone.output_layer.weight)

    def native_states(self, inputs: ExitInput) -> tuple[Tensor, Tensor | None]:  # [q, h]
        return inputs.hidden, None


class DecodeExitHead(DecodeHead):
    """An exit head. One with a layer of its own has a cache of its own: before it is evaluated on a token, it must have
    seen all tokens before that one.
    """

    def __init__(self, model: EarlyExitModel, head: ExitHead, topology: Topology):
        self.head = head
        self.layer = None if head.own_layer is None else DecodeLayer(head.own_layer, head.config, topology)
        if self._is_mapped:  # the kernel then gets the output matrix only
            super().__init__(model, model.exit_vocab, None, head.output_weight)
            for matrix in head.linear.parameters():
                if matrix.dim() == 2:
                    column_major(matrix)
            return
        super().__init__(
            model,
            model.exit_vocab,
            head.norm if isinstance(head, NormHead) else None,
            head.output_weight,
            head.mlp if isinstance(head, MLPHead) else None,
        )

    @property
    def is_fully_native(self) -> bool:
        """Whether the kernels run the whole head. torch runs an adapter, and the kernels then its norm and output
        matrix; torch also runs a linear map and everything before it.
        """
        is_torchs = self._is_mapped or isinstance(self.head, AdapterHead)
        return self.native is not None and not is_torchs and (self.layer is None or self.layer.is_native)

    @property
    def _is_mapped(self) -> bool:
        return self.head.spec.has_linear

    def take(self, hidden: Tensor, inner: ExitInput) -> ExitInput:  # [t, h]
        """Returns the head's input from a pass; `hidden` and `inner` are the outputs of the layers before it."""
        return inner if self.head.takes_mlp_input else ExitInput(hidden)

    def logits(self, inputs: ExitInput) -> Tensor:  # [q, v/tp]
        return self.head(inputs, F.linear)

    def native_states(self, inputs: ExitInput) -> tuple[Tensor, Tensor | None]:  # [q, h] each
        if self._is_mapped:
            return self.head.final_hidden(inputs), None
        match self.head:
            case MLPHead():
                return inputs.hidden, inputs.residual
            case AdapterHead():
                return self.head.adapted(inputs.hidden), None
            case LayerHead():
                assert inputs.layer_output is not None
                return inputs.layer_output, None
            case NormHead() | EmbeddingHead():
                return inputs.hidden, None
        raise AssertionError(type(self.head))


def _native(norm: Any, output: Tensor, mlp: ExitMLP | None, vocab: VocabShard) -> calls.Head:
    made = calls.Head()
    calls.fill(
        made, {"norm": getattr(norm, "weight", None), "norm_bias": getattr(norm, "bias", None), "output": output}
    )
    if mlp is not None:
        calls.fill(
            made.mlp, {"fc1": mlp.fc1.weight, "fc1_bias": mlp.fc1.bias, "fc2": mlp.fc2.weight, "fc2_bias": mlp.fc2.bias}
        )
        made.mlp.inner, made.mlp.is_gated = mlp.fc2.in_features, mlp.is_gated
    made.num_ids, made.num_rows = vocab.true_rows, vocab.rows
    if isinstance(vocab, Shortlist):
        calls.fill(made, {"token_ids": vocab.token_ids})
    return made
