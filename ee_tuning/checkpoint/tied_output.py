"""A config that ties the output matrix to the embedding, beside weights that hold both: which of them the model
predicts by.

As transformers 5 has it, they are one where their values are equal, and two, with a warning, where not: a config that
was left as it was when an output matrix was trained or taken over from elsewhere. Megatron's stages, too, each use the
copy that they have loaded.
"""

import dataclasses

import torch

from ee_tuning.checkpoint.names import embedding_name, output_name
from ee_tuning.checkpoint.safetensors_reader import TensorSource
from ee_tuning.model.config import ModelConfig
from ee_tuning.notices import warn_once

_BLOCK_BYTES = 16 << 20


def untied(config: ModelConfig) -> ModelConfig:
    """The same with an output matrix of its own."""
    return dataclasses.replace(config, ties_embeddings=False)


def holds_another_output(source: TensorSource, config: ModelConfig) -> bool:
    """Whether the output matrix, of a `source` that has one, is another than the embedding that `config` ties it to; a
    warning tells so once. Reads both, up to the first difference. Raises InputError where one has another shape than
    `config` says.
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
                f"{names[1]} in the files is another than {names[0]}: the model is taken as untied, as transformers 5 takes it; set "
                "tie_word_embeddings to false in the config to say so"
            )
            return True
    return False
