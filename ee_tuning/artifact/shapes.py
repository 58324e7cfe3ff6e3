"""A model known by its shape only, from its config.json, for planning and dry runs. Weights may be missing.

Its tensors have shapes and no content. Under fake tensors they need no memory; read as shards, they prove that every
slice of every parameter has its place.
"""

from pathlib import Path

import torch

from ee_tuning.artifact.convert import check_output_vocab, described_exits
from ee_tuning.artifact.exit_config import read_exit_config
from ee_tuning.artifact.exit_heads import ExitHeadsConfig, ExitHeadsReader
from ee_tuning.artifact.load import Sources
from ee_tuning.checkpoint.formats import has_weights, model_folder, open_model, read_shape
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.config import Config, ExitsSection, replace
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.storage.shapes_only import ShapesOnly

DEFAULT_SEQ_LENGTH = 2048
"""Default tokens per sequence of tuning, where the model has as many positions."""
DEFAULT_CHUNK_LENGTH = 4096
"""Default tokens per sequence that go through the frozen layers at a time, where sequences are more than twice as long.
"""
LARGEST_AUTO = 16384
"""Size of a shortlist whose texts are to decide it but have not been read. Most texts choose fewer tokens."""


def shape_sources(config: Config) -> Sources:
    """Returns the sources of `load_for_tuning` without content. Existing weights are compared with the model's config
    by their headers.

    Raises InputError where model and exits do not fit each other.
    """
    model = _model_config(config)
    exits = _exits_config(config, model)
    backbone = ShapesOnly(backbone_tensor_shapes(model))
    return Sources(model, backbone, exits, ShapesOnly(exits.tensor_shapes(model)))


def as_tuned(config: Config, model: ModelConfig | None = None) -> Config:
    """Returns `config` with the values that `tune` chooses where the job does not: the sequence length, the
    initialization of new exits, and validations against the final head. Raises InputError where exits.path is no
    artifact.
    """
    config = with_drafts_judged(with_seq_length(config, model))
    return config if config.exits.path else replace(config, exits={"init": config.exits.init_of_tune})


def with_seq_length(config: Config, model: ModelConfig | None = None) -> Config:
    """Replaces a tuning.seq_length of 0 by a default that depends on the model's shape, which is read unless `model`
    gives it, and a tuning.forward_chunk_length of 0 where sequences are long. Weights may be missing.
    """
    config = _with_known_length(config, model)
    length, tp = config.tuning.seq_length, config.parallel.tensor_model_parallel_size
    is_long = length > 2 * DEFAULT_CHUNK_LENGTH and length % DEFAULT_CHUNK_LENGTH == 0
    is_whole = config.tuning.trained.has_backbone or not is_long or DEFAULT_CHUNK_LENGTH % max(1, tp)
    if config.tuning.forward_chunk_length or is_whole:
        return config
    return replace(config, tuning={"forward_chunk_length": DEFAULT_CHUNK_LENGTH})


def _with_known_length(config: Config, model: ModelConfig | None) -> Config:
    if config.tuning.seq_length != 0:
        return config
    model = model or read_shape(config.model, needs_weights=False)
    return replace(config, tuning={"seq_length": min(DEFAULT_SEQ_LENGTH, model.max_position_embeddings)})


def with_drafts_judged(config: Config) -> Config:
    """Returns `config`, with validations that compare with the final head if a drafting head is tuned: only the
    acceptance of its drafts shows its quality. Raises InputError where exits.path is no artifact.
    """
    path = config.exits.path
    drafts = config.exits.drafts if path is None else read_exit_config(Path(path)).draft is not None
    return replace(config, tuning={"compare_final": True}) if drafts else config


def _model_config(config: Config) -> ModelConfig:
    folder = model_folder(config.model.path, needs_weights=False)
    if not has_weights(folder):
        return read_model_config(folder)
    source, model, _ = open_model(config.model)
    with source:
        source.check_complete(model)
    return model


def _exits_config(config: Config, model: ModelConfig) -> ExitHeadsConfig:
    section = config.exits
    if section.path is not None:
        artifact = ExitHeadsReader(Path(section.path), verifies=False)
        with artifact:
            artifact.check_complete(model)
        return artifact.config
    layers = section.layers(model.num_layers)
    if layers or not config.tuning.trained.has_backbone:
        model.check_exit_layers(layers)
    return described_exits(
        section,
        model,
        name=Path(config.model.path).name,
        dtype=getattr(torch, model.stored_dtype),
        fingerprint="",
        listed=_unread_list(section, model),
    )


def _unread_list(section: ExitsSection, model: ModelConfig) -> ListedTokens | None:
    """Returns a shortlist of the configured size, or of LARGEST_AUTO where texts decide. Its tokens do not affect any
    shape.
    """
    check_output_vocab(section, model.vocab_size)
    size = (
        section.output_vocab
        if isinstance(section.output_vocab, int)
        else LARGEST_AUTO
        if model.vocab_size > LARGEST_AUTO
        else 0
    )
    return ListedTokens(token_ids=tuple(range(size)), num_tokens=0, num_listed=0) if size else None
