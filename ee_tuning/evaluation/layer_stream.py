"""Layers of a model that are in memory one at a time: built, read, run and dropped, so that a model of any size needs
the memory of one layer.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.checkpoint.formats import BackboneSource
from ee_tuning.checkpoint.huggingface import read_backbone_tensor
from ee_tuning.config import Config
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.model.backbone import BackboneStage
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.non_finite import no_numbers, num_non_finite

# b samples · s tokens of a sample · h hidden · v/tp this rank's rows of the vocabulary

SAMPLE_LENGTH = 128


class LayerStream:
    """The embedding, the layers and the final head of a model, each cut over tensor parallelism.

    If the replicas run `in_step`, one of them reads each layer and broadcasts it; otherwise each reads its own.
    """

    def __init__(
        self,
        reader: BackboneSource,
        model: ModelConfig,
        topology: Topology,
        dtype: torch.dtype,
        max_length: int,
        *,
        in_step: bool = False,
    ):
        self.model, self.topology = model, topology
        self._reader, self.dtype, self._max_length = reader, dtype, max_length
        self._in_step = in_step and topology.dp > 1

    @torch.no_grad()
    def embedded(self, tokens: Tensor) -> Tensor:  # [b, s] int64 -> [s, b, h]
        """Returns the input of the first layer."""
        return self._built(1, 0, has_embedding=True).embed(tokens.to(self.topology.device))

    @torch.no_grad()
    def layer(self, number: int) -> Callable[[Tensor], Tensor]:
        """Reads layer `number` (1-based). Returns its function, [s, b, h] -> [s, b, h], which raises InputError where
        states are not finite.
        """
        stage = self._built(number, number)

        @torch.no_grad()
        def run(hidden: Tensor) -> Tensor:
            hidden = stage.run_layer(number, hidden)
            if num_non_finite(hidden):
                raise no_numbers(f"the hidden states behind layer {number}", self.dtype)
            return hidden

        return run

    @torch.no_grad()
    def final_head(self) -> Callable[[Tensor], Tensor]:
        """Reads the final norm and output matrix. Returns their function, […, h] -> […, v/tp]."""
        stage = self._built(1, 0, has_final_head=True)

        @torch.no_grad()
        def run(hidden: Tensor) -> Tensor:
            return torch.nn.functional.linear(stage.final_norm(hidden), stage.output_layer.weight)

        return run

    def _built(
        self, first: int, last: int, *, has_embedding: bool = False, has_final_head: bool = False
    ) -> BackboneStage:
        topology = self.topology
        stage = BackboneStage(
            self.model,
            topology,
            first_layer=first,
            last_layer=last,
            has_embedding=has_embedding,
            has_output=has_final_head,
            has_final_norm=has_final_head,
            max_length=self._max_length,
            dtype=self.dtype,
        )
        read = partial(
            read_backbone_tensor, self._reader, self.model, tp=topology.tp, tp_rank=topology.tp_rank, dtype=self.dtype
        )
        for name, parameter in stage.named_parameters():
            if not self._in_step or topology.dp_rank == 0:
                parameter.copy_(read(name))
            if self._in_step:
                dist.broadcast(parameter, group_src=0, group=topology.dp_group)
        return stage


def text_ids(config: Config, model: ModelConfig, num_samples: int) -> Tensor:  # [b, s] int64
    """Returns the first samples of exits.profile_text, at most `num_samples`. Raises InputError where it can not be
    used.
    """
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    path = Path(config.exits.profile_text or argparse.__file__)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"exits.profile_text (--text) must be a text file; {path} can not be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise InputError(
            f"exits.profile_text (--text) must be a text file in UTF-8, got {path}: {error}; unpack it where it is packed, "
            "else convert it (iconv -t utf-8)"
        ) from error
    length = min(SAMPLE_LENGTH, model.max_position_embeddings)
    ids = torch.tensor(tokenizer(text)["input_ids"][: num_samples * length])
    if len(ids) < length:
        raise InputError(
            f"exits.profile_text must have at least {length} tokens, and {path} has {len(ids)}; give a longer one"
        )
    if int(ids.max()) >= model.vocab_size:
        raise InputError(
            f"the tokenizer makes token {int(ids.max())}, and the model's vocabulary ends at {model.vocab_size - 1}; "
            "give its own --tokenizer"
        )
    return ids[: len(ids) // length * length].view(-1, length)


def angular_distances(states: list[Tensor]) -> Tensor:  # [layers + 1] of […, h] -> [layers + 1, layers + 1]
    """Returns the mean angle between every two of `states`, as a share of π (arXiv 2403.17887), float64."""
    unit = [torch.nn.functional.normalize(each.flatten(0, -2).float(), dim=-1) for each in states]
    found = torch.zeros(len(unit), len(unit), dtype=torch.float64)
    for i, one in enumerate(unit):
        for j in range(i):
            cosine = (one * unit[j]).sum(-1).clamp(-1, 1)
            found[i, j] = found[j, i] = (cosine.arccos() / math.pi).double().mean()
    return found
