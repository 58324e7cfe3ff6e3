"""Parameters of a model that tuning.trainable trains beside the exits, and their names in files; LoRA's matrices have
peft's. Pure functions.
"""

import random

from ee_tuning.checkpoint.hf_names import HF_NAMES, HFNames
from ee_tuning.checkpoint.names import backbone_shard, layer_parameter_names, norm_kinds
from ee_tuning.config import TuningSection
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.lora_targets import FUSED, ROW_PARALLEL, TARGETS, target_shape
from ee_tuning.storage.tensor_slice import Shard, TensorShape, TensorSlice

PEFT_PREFIX = "base_model.model."
"""peft's prefix for the names inside its wrapper."""
_HF_FIELDS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def check_trainable(tuning: TuningSection, config: ModelConfig) -> None:
    """Raises InputError where tuning.trainable can not be done with this model."""
    trained, word = tuning.trained, f"tuning.trainable = {tuning.trainable}"
    if not trained.has_backbone:
        return
    if tuning.backbone_weights != "native" and trained.kind != "lora":
        raise InputError(
            f"{word} can not train weights that tuning.backbone_weights = {tuning.backbone_weights} quantizes; set it to "
            "native, or train lora beside them"
        )
    if trained.num_last > config.num_layers:
        raise InputError(f"{word} asks for more than the model's {config.num_layers} layers; give at most that many")
    if trained.kind == "lora":
        lora_targets(tuning, config)


def check_frozen_output(tuning: TuningSection) -> None:
    """Raises InputError where tuning.trainable trains the output matrix that stages with exits apply to a teacher's
    states.
    """
    if tuning.trained.has_embedding:
        raise InputError(
            "tuning.teacher = hidden is for an output matrix that stays as it is, of which stages with exits have a copy, and "
            f"tuning.trainable = {tuning.trainable} trains it; use top_k, or --trainable backbone"
        )


def check_tied(tuning: TuningSection) -> None:
    """Raises InputError where tuning.trainable trains the output matrix to which exits are tied."""
    if tuning.trained.has_embedding:
        raise InputError(
            f"exits.output = tied is for an output matrix that stays as it is, and tuning.trainable = {tuning.trainable} "
            "trains it; use --exit-output shared, whose exits train it, too, or untied, or --trainable backbone"
        )


def lora_targets(tuning: TuningSection, config: ModelConfig) -> tuple[str, ...]:
    """Returns the linear maps beside which LoRA trains. Raises InputError where the model has none of that name."""
    if not has_lora_targets(config):
        raise InputError(
            f"tuning.trainable = lora is for models with {', '.join(TARGETS[:3])}, …, and a {config.family} has fused or "
            "transposed matrices; use mlp, last:K or backbone"
        )
    attention = FUSED["self_attention.linear_qkv"] + FUSED["self_attention.linear_proj"]
    possible = tuple(
        target
        for target in TARGETS
        if target in attention or not (config.num_experts or (target == "gate_proj" and not config.is_gated))
    )
    unknown = [target for target in tuning.lora_targets if target not in possible]
    if unknown:
        raise InputError(
            f"tuning.lora_targets must be linear maps of the model ({', '.join(possible)}), got {unknown[0]}, which matches "
            "none"
        )
    return tuple(target for target in possible if target in tuning.lora_targets or not tuning.lora_targets)


def trained_parameters(tuning: TuningSection, config: ModelConfig) -> list[str]:
    """Returns Megatron-core's names of the parameters trained beside the exits, over all layers. LoRA's matrices are
    named after the linear map that they stand beside.
    """
    trained, layers = tuning.trained, range(1, config.num_layers + 1)
    if trained.kind == "lora":
        targets = lora_targets(tuning, config)
        return [
            f"decoder.layers.{layer - 1}.{path}.lora.{target}.{matrix}"
            for layer in layers
            for path, names in FUSED.items()
            for target in names
            if target in targets
            for matrix in ("lora_A", "lora_B")
        ]
    own = [
        f"decoder.layers.{layer - 1}.{name}"
        for layer in layers
        for name in layer_parameter_names(config, layer)
        if trained.has_backbone and trained.trains(layer, name, config.num_layers)
    ]
    has_norm = trained.kind in ("last", "half", "backbone", "all")
    norm = [f"decoder.final_layernorm.{kind}" for kind in norm_kinds(config) if has_norm]
    ends = ["embedding.word_embeddings.weight", "output_layer.weight"] * trained.has_embedding
    has_positions = trained.has_embedding and config.position == "learned"
    return own + norm + ends + ["embedding.position_embeddings.weight"] * has_positions


def trained_shard(parameter: str, tuning: TuningSection, config: ModelConfig, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of one of `trained_parameters`, in slices of the stored tensors: the model's, under
    Hugging Face's names, or LoRA's, under peft's.
    """
    if ".lora." in parameter:
        return lora_shard(parameter, config, tuning.lora_rank, tp, tp_rank)
    return backbone_shard(parameter, config, tp, tp_rank)


def trained_shapes(tuning: TuningSection, config: ModelConfig) -> dict[str, TensorShape]:
    """Returns every stored tensor that is trained, and its whole shape."""
    return {
        piece.name: piece.shape
        for name in trained_parameters(tuning, config)
        for piece in trained_shard(name, tuning, config, 1, 0).pieces
    }


def half_of(config: ModelConfig, seed: int, choice: int) -> frozenset[str]:
    """Returns the stored tensors of the `choice`-th half: of each layer two of the four matrices of attention and one
    of two norms; of its three MLP matrices two in every other layer and one in the rest (HFT, arXiv 2404.18466, chooses
    within these categories, too). A bias goes with its matrix. The final norm is always trained.
    """
    draw, layers = random.Random(f"{seed}/{choice}"), range(1, config.num_layers + 1)
    chosen = {piece.name for kind in norm_kinds(config) for piece in _pieces(f"decoder.final_layernorm.{kind}", config)}
    rounds_up = set(draw.sample(layers, config.num_layers // 2))
    for layer in layers:
        stems: dict[str, dict[str, list[str]]] = {"attention": {}, "mlp": {}, "norm": {}}
        for name in layer_parameter_names(config, layer):
            category = "norm" if "layernorm" in name else "mlp" if name.startswith("mlp.") else "attention"
            for piece in _pieces(f"decoder.layers.{layer - 1}.{name}", config):
                held = stems[category].setdefault(piece.name.rpartition(".")[0], [])
                held += [] if piece.name in held else [piece.name]
        for own in stems.values():
            count = (len(own) + (layer in rounds_up)) // 2
            chosen.update(name for stem in draw.sample(sorted(own), count) for name in own[stem])
    return frozenset(chosen)


def _pieces(parameter: str, config: ModelConfig) -> tuple[TensorSlice, ...]:
    return backbone_shard(parameter, config, 1, 0).pieces


def has_partial_gradient(parameter: str, *, is_replicated: bool, cuts_sequence: bool) -> bool:
    """Whether each tensor-parallel rank computes a share of the gradient of a replicated parameter: of its own tokens
    where the sequence is cut, of its own heads for norms of queries and keys.
    """
    if parameter.startswith("embedding."):  # the gradient of all tokens comes back to every rank
        return False
    return is_replicated and (cuts_sequence or "q_layernorm" in parameter or "k_layernorm" in parameter)


def lora_target_stem(target: str, names: HFNames) -> str:
    """Returns the name of a linear map within its layer."""
    stem: str = getattr(names, _HF_FIELDS[target])
    return stem


def has_lora_targets(config: ModelConfig) -> bool:
    """Whether the family's linear maps are single ones with these names."""
    names = HF_NAMES[config.family]
    return not names.is_transposed and names.query != names.key


def lora_shard(parameter: str, config: ModelConfig, rank: int, tp: int, tp_rank: int) -> Shard:
    """Returns rank `tp_rank`'s part of a parameter such as
    `decoder.layers.0.self_attention.linear_qkv.lora.q_proj.lora_A`.
    """
    path, matrix = parameter.rsplit(".", 1)
    target, index, names = path.rpartition(".")[2], path.split(".")[2], HF_NAMES[config.family]
    name = f"{PEFT_PREFIX}{names.layers}.{index}.{lora_target_stem(target, names)}.{matrix}.weight"
    outputs, inputs = target_shape(target, config)
    cuts_columns = target in ROW_PARALLEL
    if matrix == "lora_A":
        start, stop = (tp_rank * inputs // tp, (tp_rank + 1) * inputs // tp) if cuts_columns else (0, rank)
        return Shard((TensorSlice(name, (rank, inputs), int(cuts_columns), start, stop),))
    start, stop = (0, outputs) if cuts_columns else (tp_rank * outputs // tp, (tp_rank + 1) * outputs // tp)
    return Shard((TensorSlice(name, (outputs, rank), 0, start, stop),))
