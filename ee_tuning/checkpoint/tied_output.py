"""Decides which output matrix a model uses whose config ties it to the embedding while its weights hold both.

As in transformers 5, they are one matrix if their values are equal, and otherwise two, with a warning: the config was
not updated when an output matrix was trained or taken from elsewhere. Megatron's stages, too, each use the copy that
they have loaded.
"""

import dataclasses

import torch

from ee_tuning.checkpoint.names import embedding_name, output_name
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.notices import warn_once
from ee_tuning.storage.tensor_source import TensorSource

_BLOCK_BYTES = 16 << 20


def untied(config: ModelConfig) -> ModelConfig:
    """Returns the config with a separate output matrix."""
    return dataclasses.replace(config, ties_embeddings=False)


def holds_another_output(source: TensorSource, config: ModelConfig) -> bool:
    """Whether the output matrix of `source` differs from the embedding that `config` ties it to. Warns once if so.

    Reads both, up to the first difference. Raises InputError where one has another shape than `config` says.
    """
    names = embedding_name(config), output_name(config)
    for name in names:
        source.check_shape(name, (config.vocab_size, config.hidden_size))
    step = max(1, _BLOCK_BYTES // (config.hidden_size * source.dtype(names[0]).itemsize))
    for row in range(0, config.vocab_size, step):
        first, second = (source.rows(name, row, min(row + step, config.vocab_size)) for name in names)
        if not torch.equal(first, second) and not torch.allclose(
            first.double(), second.double(), rtol=0, atol=0, equal_nan=True
        ):
            warn_once(
                f"{getattr(source, 'folder', source)}: the config ties the output matrix to the embedding (tie_word_embeddings), and "
                f"{names[1]} in the files differs from {names[0]}: the model is used as untied, as in transformers 5; set "
                "tie_word_embeddings to false in the config to say so"
            )
            return True
    return False
