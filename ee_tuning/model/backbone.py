"""This stage of the frozen backbone: Megatron-core's embedding and layers, built one by one from the stock layer spec.

Parameters have the names of a stock GPTModel, with global layer indices on every stage.
"""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ee_tuning.config import WeightFormat
from ee_tuning.model.activation import activation
from ee_tuning.model.attention import CausalAttention, softmax_scale
from ee_tuning.model.cast import cast_parameters
from ee_tuning.model.documents import PackedDocuments, rotations
from ee_tuning.model.experts import dispatch_in_place, expert_fields
from ee_tuning.model.norm import backbone_norm
from ee_tuning.model.quantized_linear import quantize_layer
from ee_tuning.model.rope import rotary_angles
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.megatron_import import importing_megatron
from ee_tuning.parallel.topology import Topology

with importing_megatron():
    from megatron.core import __version__ as megatron_version
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import RowParallelLinear
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

# s sequence · b micro-batch · h hidden · v/tp this rank's shard of the vocabulary

# Megatron-core wants one queue for all work of a GPU that trains under tensor parallelism; the relay would wait in it.
warnings.filterwarnings("ignore", message="When using (async grad allreduce|sequence parallelism)")


def transformer_config(
    config: ModelConfig, topology: Topology, dtype: torch.dtype, *, cuts_sequence: bool = False
) -> TransformerConfig:
    """Returns Megatron's description of the layers, without pipelining: stages build the layers they are given.

    `cuts_sequence`: layers take and return each tensor-parallel rank's part of the sequence (Megatron's sequence
    parallelism).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core deprecates some of its own defaults
        return _transformer_config(config, topology, dtype, cuts_sequence)


def _transformer_config(
    config: ModelConfig, topology: Topology, dtype: torch.dtype, cuts_sequence: bool
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        layernorm_epsilon=config.norm_epsilon,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        gated_linear_unit=config.is_gated,
        activation_func=activation(config),
        add_bias_linear=config.has_linear_bias,
        add_qkv_bias=config.has_qkv_bias,
        qk_layernorm=config.has_qk_norm,
        softmax_scale=softmax_scale(config),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        sequence_parallel=cuts_sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=topology.device.type == "cpu",
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **expert_fields(config),
    )


def layer_spec(config: ModelConfig, number: int) -> Any:
    """Returns the spec of Megatron's stock layer with this project's norms and core attention."""
    norm = backbone_norm(config)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_experts if config.has_experts(number) else None,
        normalization="RMSNorm" if config.norm == "rms" else None,
        qk_layernorm=config.has_qk_norm,
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.has_proj_bias:
        attention.linear_proj = BiasedProjection
    if config.has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec


def layers_in_words() -> str:
    """Returns, for a log, the modules that layers of the backbone and of exit heads are built from."""
    unused = " (Transformer Engine is installed, and not used)" if find_spec("transformer_engine") else ""
    return f"Megatron-core {megatron_version}, local layer spec{unused}"


def build_layer(
    config: ModelConfig, topology: Topology, number: int, dtype: torch.dtype, *, cuts_sequence: bool = False
) -> Any:
    """Builds layer `number` (1-based) like the backbone's, without weights. `cuts_sequence` as in
    `transformer_config`.
    """
    megatron = transformer_config(config, topology, dtype, cuts_sequence=cuts_sequence)
    layer = build_module(layer_spec(config, number), config=megatron, layer_number=number)
    if config.has_experts(number):
        dispatch_in_place(layer.mlp)
    cast_parameters(layer, device=topology.device)  # Megatron-core creates routers on the CPU
    return layer


def apply_layer(
    layer: Any,
    hidden: Tensor,
    angles: Tensor,
    config: ModelConfig,  # [s, b, h], [positions, d]
    documents: PackedDocuments | None,
) -> Tensor:  # [s, b, h]
    """Runs a layer (`build_layer`) causally over whole sequences, [s/tp, b, h] where it cuts them; `documents`
    separates documents.
    """
    length = hidden.shape[0] * (layer.config.tensor_model_parallel_size if layer.config.sequence_parallel else 1)
    rotary = rotations(angles, length, documents) if config.position == "rope" else None
    return layer(hidden, attention_mask=documents, rotary_pos_emb=rotary)[0]


class BiasedProjection(RowParallelLinear):
    """The attention's output projection with a bias, where other linear maps have none. Megatron has one switch for all
    of them.
    """

    def __init__(self, *sizes: int, **keys: Any):
        super().__init__(*sizes, **{**keys, "bias": True})


class BackboneStage(nn.Module):
    """Layers `first_layer`..`last_layer` (1-based), with the word embedding on the first stage and the final head on
    request.

    Frozen and in evaluation mode. Weights are uninitialized until a checkpoint is loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        topology: Topology,
        *,
        first_layer: int,
        last_layer: int,
        has_embedding: bool,
        has_output: bool,
        has_final_norm: bool,
        max_length: int,
        dtype: torch.dtype,
        cuts_sequence: bool = False,
        weights: WeightFormat = "native",
    ):
        """`cuts_sequence`: layers take and return [s/tp, b, h], each tensor-parallel rank's part of the sequence."""
        super().__init__()
        self.config, self.dtype = config, dtype
        self.first_layer, self.last_layer = first_layer, last_layer
        megatron = transformer_config(config, topology, dtype)
        padded = config.padded_vocab_size(topology.tp)
        if has_embedding:
            self.embedding = LanguageModelEmbedding(
                megatron,
                padded,
                config.max_position_embeddings,
                tp_group=topology.tp_group,
                position_embedding_type="rope" if config.position == "rope" else "learned_absolute",
            )
            # Megatron-core creates the embedding of positions on the CPU in float32.
            cast_parameters(self.embedding, dtype, topology.device)
        layers = nn.ModuleDict()
        for number in range(first_layer, last_layer + 1):
            layers[str(number - 1)] = layer = build_layer(config, topology, number, dtype, cuts_sequence=cuts_sequence)
            if weights != "native":  # layer by layer, so that only one layer at a time exists in `dtype`
                quantize_layer(layer, weights, topology)
        self.decoder = nn.ModuleDict({"layers": layers})
        if has_final_norm:
            self.decoder["final_layernorm"] = backbone_norm(config)(
                megatron, config.hidden_size, eps=config.norm_epsilon
            )
        if has_output:
            self.output_layer = nn.Linear(
                config.hidden_size, padded // topology.tp, bias=False, dtype=dtype, device=topology.device
            )
            if config.ties_embeddings and has_embedding:
                self.output_layer.weight = self.embedding.word_embeddings.weight
        self.angles: Tensor
        self.register_buffer("angles", rotary_angles(config, max_length, topology.device), persistent=False)
        self.eval().requires_grad_(False)

    def layer(self, number: int) -> Any:
        """Returns Megatron's TransformerLayer `number`, 1-based over the whole model."""
        layers = self.decoder["layers"]
        assert isinstance(layers, nn.ModuleDict)
        return layers[str(number - 1)]

    def final_norm(self, hidden: Tensor) -> Tensor:  # […, h] -> […, h]
        """Applies the norm before the model's own output matrix, if this stage has it."""
        return self.decoder["final_layernorm"](hidden)

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:  # [b, s], [b, s] -> [s, b, h]
        """Embeds tokens, on the first stage only. `positions`, by default 0, 1, …, matter for learned position
        embeddings.
        """
        if positions is None and self.config.position == "learned":
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.embedding(tokens, positions)

    def run_layer(
        self, number: int, hidden: Tensor, documents: PackedDocuments | None = None
    ) -> Tensor:  # [s, b, h] -> [s, b, h]
        """Runs one layer causally over whole sequences, or this rank's part of them. `documents` separates
        documents.
        """
        return apply_layer(self.layer(number), hidden, self.angles, self.config, documents)
