"""A second, frozen model as the teacher of the final head (tuning.teacher_model), cut into stages of its own.

Its hidden states go down the relay beside those of the trained model, in the same messages.
"""

# s sequence, or this rank's part of it where the plan cuts it · b micro-batch · h, ht hidden sizes of both
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.artifact.load import Sources, build_stage
from ee_tuning.artifact.stage_plans import plan_frozen
from ee_tuning.checkpoint.formats import check_model, model_folder, open_model
from ee_tuning.config import Config, ModelSection
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.losses.teacher import HiddenTeacher
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology


class TeacherModel:
    """This stage of the teacher."""

    def __init__(self, config: Config, path: str, student: ModelConfig, topology: Topology) -> None:
        """Loads the model at `path`. Raises InputError where it can not teach the student."""
        source, model, _ = open_model(ModelSection(path=path, trust_pickle=config.model.trust_pickle))
        with source:
            on_first_rank(topology, lambda: _check_vocabulary(config, path, model, student))
            model.check_layout(topology.tp, topology.pp)
            check_model(source, model, topology, verifies=config.exits.verify)
            plans = plan_frozen(config, model, topology)
            self._model = build_stage(Sources(model, source, None, None), plans, topology).model
        self._topology, self.config = topology, model

    @property
    def width(self) -> int:
        """The hidden size, ht."""
        return self.config.hidden_size

    def embed(self, tokens: Tensor, documents: PackedDocuments | None) -> Tensor:  # [b, s] -> [s, b, ht]
        """Embeds tokens, on the first stage."""
        return self._model.embed(tokens, documents)

    @torch.no_grad()
    def forward(self, hidden: Tensor, documents: PackedDocuments | None) -> Tensor:  # [s, b, ht] -> [s, b, ht]
        """Runs this stage's layers."""
        return self._model.run_layers(hidden, documents)[0]

    @torch.no_grad()
    def distribution(self, hidden: Tensor) -> HiddenTeacher:  # [s, b, ht]
        """Returns the teacher's distribution, on the last stage."""
        final = self._model.whole_sequence(self._model.final_hidden(hidden))
        return HiddenTeacher(final, self._model.backbone.output_layer.weight)


def _check_vocabulary(config: Config, path: str, teacher: ModelConfig, student: ModelConfig) -> None:
    remedy = "give the model that this one was pruned from, or another one with its vocabulary"
    if teacher.vocab_size != student.vocab_size:
        raise InputError(
            f"tuning.teacher_model must have the vocabulary of the model, {student.vocab_size} tokens, and {path} has "
            f"{teacher.vocab_size}; {remedy}"
        )
    one, other = (_tokens(model_folder(each)) for each in (path, config.model.path))
    if one is not None and other is not None and one != other:
        raise InputError(
            f"tuning.teacher_model must have the vocabulary of the model, and the tokenizers of {path} and "
            f"{config.model.path} have other tokens; {remedy}"
        )


def _tokens(folder: Path) -> Any:
    """Returns the tokens of a folder's tokenizer.json, or None where it has none."""
    try:
        return read_json(folder / "tokenizer.json")["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
