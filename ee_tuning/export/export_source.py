"""The inputs of a merged export: a model in any format, its Hugging Face config, and the exits bound to it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning.artifact.convert import model_name
from ee_tuning.artifact.exit_heads import ExitHeadsReader, check_bound_to
from ee_tuning.checkpoint.adapted_source import AdaptedSource
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import BackboneSource, background_check, describing_file, model_folder, open_model
from ee_tuning.checkpoint.gguf_file import GgufReader, is_gguf
from ee_tuning.checkpoint.model_card import MODEL_FOLDER, shell_word
from ee_tuning.config import Config
from ee_tuning.model_config.config import ModelConfig, model_config_from_hf
from ee_tuning.model_config.huggingface_config import huggingface_config
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.manifest import check_replaceable
from ee_tuning.storage.safetensors_reader import SafetensorsFolder


@dataclass(frozen=True)
class ExportSource:
    """Checked inputs: the weights match the shape, and the exits, if any, belong to the model."""

    source: BackboneSource
    model: ModelConfig
    files: SafetensorsFolder | None
    """The source again, if it is a Hugging Face folder, whose files can be copied."""
    has_companions: bool
    """Whether the model's folder is a Hugging Face folder, with files beside the weights."""
    description: dict[str, Any]
    """config.json: the model's own, unchanged, if it has one."""
    artifact: ExitHeadsReader | None
    finish_check: Callable[[], None]
    """Waits until the model's files have been compared with its manifest, if any. Call it before the output is put in
    place.

    Raises InputError, on all ranks, where a file is altered.
    """

    @property
    def adapter(self) -> str | None:
        """The name of the folder of trained weights over the model, if any."""
        return self.source.adapter.name if isinstance(self.source, AdaptedSource) else None

    @property
    def name(self) -> str:
        """The name for messages."""
        return model_name(self.source.folder)

    @property
    def merging(self) -> str:
        """The command that writes the model as a folder that engines load, or "" where it is one."""
        if self.has_companions and self.adapter is None:
            return ""
        own = self.source.folder.name if is_gguf(self.source.folder) else self.name
        adapter = "" if self.adapter is None else f" --adapter {shell_word(self.adapter, 'ADAPTER')}"
        return f"ee-tuning export --format hf --model {shell_word(own, 'MODEL')}{adapter} --output {MODEL_FOLDER}"

    def described(self) -> dict[str, Any]:
        """Returns config.json, corrected where it ties an output matrix that differs from the embedding."""
        ties = model_config_from_hf(self.description, self.source.folder / "config.json").ties_embeddings
        return (
            self.description
            if ties == self.model.ties_embeddings
            else {**self.description, "tie_word_embeddings": not ties}
        )


def check_target(config: Config, output: Path, overwrite: bool, marks: Sequence[str]) -> None:
    """Raises InputError where `output` can not become an export of model.path and exits.path: it is one of them, or
    `check_replaceable` refuses it.
    """
    check_apart(output, (model_folder(config.model.path), config.exits.path, config.data.tokenizer))
    check_replaceable(output, overwrite, marks)


@contextmanager
def open_for_export(config: Config, topology: Topology | None) -> Iterator[ExportSource]:
    """Opens model.path and exits.path while the context is open.

    Raises InputError where they are damaged or do not belong together.
    """
    with ExitStack() as stack:
        source, model, _ = open_model(config.model)
        stack.enter_context(source)
        finish_check = stack.enter_context(background_check(source, model, topology, verifies=config.exits.verify))
        artifact = None
        if config.exits.path is not None:
            artifact = stack.enter_context(
                ExitHeadsReader(Path(config.exits.path), topology, verifies=config.exits.verify)
            )
            check_bound_to(artifact, on_first_rank(topology, lambda: fingerprint(source, model)))
            artifact.check_complete(model)
        base = source.base if isinstance(source, AdaptedSource) else source
        files = source if isinstance(source, SafetensorsFolder) else None
        description = base.description if isinstance(base, GgufReader) else _description(config, source.folder, model)
        is_huggingface = isinstance(base, SafetensorsFolder)
        yield ExportSource(source, model, files, is_huggingface, description, artifact, finish_check)


def _description(config: Config, folder: Path, model: ModelConfig) -> dict[str, Any]:
    own = describing_file(folder, config.model.config)
    return huggingface_config(model) if own is None else json.loads(own.read_text(encoding="utf-8"))
