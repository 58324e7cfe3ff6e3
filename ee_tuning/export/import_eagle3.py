"""Imports a published EAGLE-3 head as an exit-heads artifact, for further tuning."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.artifact.convert import model_name, print_summary
from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_heads import check_output, save_exit_heads
from ee_tuning.checkpoint.adapted_source import AdaptedSource
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.checkpoint.formats import BackboneSource, open_model
from ee_tuning.checkpoint.gguf_file import GgufReader
from ee_tuning.checkpoint.names import embedding_name
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.export.eagle3_layout import (
    D2T,
    EMBEDDING,
    OUTPUT,
    T2D,
    artifact_part,
    check_vocab_size,
    read_published_config,
)
from ee_tuning.json_file import read_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.non_finite import check_finite
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_blocks import paired_blocks


def import_eagle3(config: Config, folder: Path, output: Path, *, overwrite: bool = False) -> None:
    """Writes the head in `folder`, of either layout, for the model of model.path to `output`, in one process.

    The artifact has the model's dtype. Raises InputError where the head is broken, not supported or of another model.
    """
    check_output(output, overwrite)
    reader, model, _ = open_model(config.model)
    with reader:
        reader.check_complete(model)
        path = folder / "config.json"
        described = _read(path)
        draft = read_published_config(described, path, model)
        with SafetensorsFolder(folder, "model") as head:
            published = _Published(head, model)
            check_vocab_size(described, path, len(published.token_ids) or model.vocab_size)
            published.check_embedding(reader)
            exits = ExitHeadsConfig(
                exit_layers=(model.num_layers,),
                architecture=("eagle3",),
                output="untied" if published.has_output else "tied",
                dtype=str(reader.dtype(embedding_name(model))).removeprefix("torch."),
                model_name=model_name(reader.folder),
                model_shape=model_shape(model),
                model_fingerprint=fingerprint(reader, model),
                init="published",
                output_vocab={"size": len(published.token_ids), "tokens": 0, "share": 0.0}
                if published.token_ids
                else None,
                token_ids=published.token_ids,
                draft=draft,
            )
            save_exit_heads(output, exits, model, published.tensors(exits), overwrite=overwrite)
    print_summary(config, exits, output)


class _Published:
    """The tensors of a published head, by the artifact's names."""

    def __init__(self, head: SafetensorsFolder, model: ModelConfig) -> None:
        self._head, self._model = head, model
        self._names = {artifact_part(name): name for name in head.names() if name not in (D2T, T2D, EMBEDDING)}
        self.has_output = OUTPUT in head.names()
        self.token_ids, self._order = self._read_vocabulary()

    def check_embedding(self, reader: BackboneSource) -> None:
        """Raises InputError where the head contains word embeddings that differ from the model's, which are used
        instead.
        """
        if EMBEDDING not in self._head.names():
            return
        own = embedding_name(self._model)
        self._head.check_shape(EMBEDDING, (self._model.vocab_size, self._model.hidden_size))
        is_same = _is_quantized_same if _is_quantized(reader, own) else _is_same
        for theirs, ours in paired_blocks((self._head, EMBEDDING), (reader, own)):
            if not is_same(theirs.float(), ours.float()):
                raise InputError(
                    f"{self._head.folder}: {EMBEDDING} must be the model's own word embedding, and is another; heads with "
                    "embeddings of their own are not supported"
                )

    def tensors(self, exits: ExitHeadsConfig) -> Iterator[tuple[str, Tensor]]:
        """Yields the artifact's tensors. Raises InputError where one is missing, has another shape, or does not belong
        to the head.
        """
        expected = exits.tensor_shapes(self._model)
        prefix = f"exits.{self._model.num_layers}."
        for part, name in self._names.items():
            if prefix + part not in expected:
                raise InputError(
                    f"{self._head.folder}: tensor {name} is no part of a head of EAGLE-3 as its config.json describes it"
                )
        for name, shape in expected.items():
            part = name.removeprefix(prefix)
            source = self._names.get(part, part)
            self._head.check_shape(source, shape)
            values = check_finite(self._head.folder, source, self._head.full(source))
            yield name, values[self._order] if part == "output.weight" and self._order is not None else values

    def _read_vocabulary(self) -> tuple[tuple[int, ...], Tensor | None]:
        """Returns the draft tokens, increasing, and each one's row of the output matrix; () for the whole
        vocabulary.
        """
        if D2T not in self._head.names():
            return (), None
        if not self.has_output:
            raise InputError(f"{self._head.folder} holds {D2T} and no {OUTPUT}, whose rows it describes")
        offsets = self._head.full(D2T)
        if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"{self._head.folder}: {D2T} must be a row of whole numbers, at least one, got {list(offsets.shape)} of {offsets.dtype}"
            )
        ids, order = (offsets.long() + torch.arange(len(offsets))).sort()
        wrong = ids[(ids < 0) | (ids >= self._model.vocab_size)]
        if len(wrong) or (ids.diff() == 0).any():
            what = f"token {int(wrong[0])}" if len(wrong) else f"token {int(ids[1:][ids.diff() == 0][0])} twice"
            raise InputError(
                f"{self._head.folder}: {D2T} must map each draft token to another one of the model's "
                f"{self._model.vocab_size}, and maps one to {what}; the head is broken or of another model"
            )
        if len(ids) == self._model.vocab_size:
            return (), order
        return tuple(ids.tolist()), order


def _is_same(theirs: Tensor, ours: Tensor) -> bool:
    return torch.allclose(theirs, ours, rtol=1e-2, atol=1e-6)


def _is_quantized_same(theirs: Tensor, ours: Tensor) -> bool:
    # 4 bits are off by up to a fifth of a row's norm; rows of other embeddings differ by more than all of it.
    return bool(((theirs - ours).norm(dim=1) <= 0.25 * theirs.norm(dim=1)).all())


def _is_quantized(reader: BackboneSource, name: str) -> bool:
    base = reader.base if isinstance(reader, AdaptedSource) else reader
    return isinstance(base, GgufReader) and base.is_quantized(name)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise InputError(
            f"--eagle3 must be a folder with a head's config.json, and {path} can not be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
