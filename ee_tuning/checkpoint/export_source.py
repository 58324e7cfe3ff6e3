"""What a merged export is made of: a model in any of the formats, its description as Hugging Face has it, exits that
are bound to it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.apart import check_apart
from ee_tuning.checkpoint.convert import model_name
from ee_tuning.checkpoint.exit_heads import ExitHeadsReader, check_bound_to
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import BackboneSource, background_check, describing_file, model_folder, open_model
from ee_tuning.checkpoint.gguf_file import GgufReader
from ee_tuning.checkpoint.manifest import check_replaceable
from ee_tuning.checkpoint.safetensors_reader import SafetensorsFolder
from ee_tuning.config import Config
from ee_tuning.model.config import ModelConfig, model_config_from_hf
from ee_tuning.model.huggingface_config import huggingface_config
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology


@dataclass(frozen=True)
class ExportSource:
    """Checked: the weights are those of the shape, and the exits, where there are any, are this model's."""

    source: BackboneSource
    model: ModelConfig
    files: SafetensorsFolder | None
    """The same, where it is a Hugging Face folder, whose files can be copied as they are."""
    description: dict[str, Any]
    """config.json: the model's own where it has one, as it is."""
    artifact: ExitHeadsReader | None
    finish_check: Callable[[], None]
    """Waits until the model's files, where it has a manifest, were compared with it, and raises InputError, on all
    ranks, where one is
    altered: to be called before what was written is put in place.
    """

    @property
    def name(self) -> str:
        """The name that messages show."""
        return model_name(self.source.folder)

    def described(self) -> dict[str, Any]:
        """config.json, true to the weights: it may tie an output matrix that is another than the embedding."""
        ties = model_config_from_hf(self.description, self.source.folder / "config.json").ties_embeddings
        return (
            self.description
            if ties == self.model.ties_embeddings
            else {**self.description, "tie_word_embeddings": not ties}
        )


def check_target(config: Config, output: Path, overwrite: bool, marks: Sequence[str]) -> None:
    """Raises InputError where `output` can not become an export of model.path and exits.path, as `check_replaceable` or
    because it is one of them.
    """
    check_apart(output, (model_folder(config.model.path), config.exits.path, config.data.tokenizer))
    check_replaceable(output, overwrite, marks)


@contextmanager
def open_for_export(config: Config, topology: Topology | None) -> Iterator[ExportSource]:
    """model.path and exits.path, for the time of the block. Raises InputError where they are not sound, or do not
    belong together.
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
        files = source if isinstance(source, SafetensorsFolder) else None
        description = (
            source.description if isinstance(source, GgufReader) else _description(config, source.folder, model)
        )
        yield ExportSource(source, model, files, description, artifact, finish_check)


def _description(config: Config, folder: Path, model: ModelConfig) -> dict[str, Any]:
    own = describing_file(folder, config.model.config)
    return huggingface_config(model) if own is None else json.loads(own.read_text(encoding="utf-8"))
