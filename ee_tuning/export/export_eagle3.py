"""Exports a drafting head as a folder for engines, in the layout of LlamaForCausalLMEagle3 (vLLM, SGLang) or of
speculators.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.artifact.eagle3_card import eagle3_card
from ee_tuning.artifact.eagle3_engines import READ, eagle3_engines
from ee_tuning.artifact.exit_config import exit_config_tree
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.checkpoint.hub import hub_name
from ee_tuning.checkpoint.huggingface_files import backbone_files
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.export.eagle3_layout import D2T, T2D, Layout, published_config, published_name
from ee_tuning.export.export_source import ExportSource, check_target, open_for_export
from ee_tuning.export.folder_writer import MARKS, write_folder
from ee_tuning.json_file import to_json
from ee_tuning.storage.safetensors_layout import SafetensorsLayout
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource

DEFAULT_STEPS = 3
"""Number of tokens for engines to draft, where the head was not tuned here."""


def export_eagle3(config: Config, output: Path, layout: Layout, *, overwrite: bool = False) -> None:
    """Writes the drafting head of exits.path for the model of model.path to `output`, in one process.

    Raises InputError where they do not belong together, or `output` can not be written; nothing is left behind then.
    """
    check_target(config, output, overwrite, MARKS)
    with open_for_export(config, None) as model:
        assert model.artifact is not None and model.artifact.config.draft is not None
        _check_engines(model.model.family, layout)
        tensors = PublishedTensors(model.artifact, layout, model.model.vocab_size)
        described = _config(config, model, layout)
        tree = exit_config_tree(model.artifact.config)
        card = eagle3_card(model.name, tree, layout, _num_steps(model), model.merging)
        files = SafetensorsLayout("model", tensors.shapes, {name: tensors.dtype(name) for name in tensors.shapes})

        def complete(partial: Path) -> None:
            files.write_index(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / "config.json").write_text(to_json(described, indent=2) + "\n", encoding="utf-8")

        write_folder(model, backbone_files(tensors, files), output, None, complete)


def _check_engines(family: str, layout: Layout) -> None:
    """Raises InputError where no engine that reads the layout takes a head for a model of `family`."""
    engines = eagle3_engines(family)
    if engines if layout == "eagle3" else "vLLM" in engines:
        return
    whose = " and ".join(f"{name} {READ[name]}" for name in (("vLLM", "SGLang") if layout == "eagle3" else ("vLLM",)))
    raise InputError(
        f"--format {layout} writes heads for {whose}, where a {family} takes none; draft with it "
        "here, by ee-tuning generate --policy speculative"
    )


class PublishedTensors(TensorSource):
    """The tensors of an export by published names, from the artifact or its shortlist."""

    def __init__(self, artifact: ExitHeadsReader, layout: Layout, vocab_size: int) -> None:
        self._artifact, self._vocab_size = artifact, vocab_size
        self._ids = torch.tensor(artifact.config.token_ids, dtype=torch.int64)
        self._sources = {published_name(name.split(".", 2)[2], layout): name for name in artifact.names()}
        made = {D2T: (len(self._ids),), T2D: (vocab_size,)} if len(self._ids) else {}
        self.shapes: dict[str, TensorShape] = {
            **{name: artifact.shape(source) for name, source in self._sources.items()},
            **made,
        }

    def shape(self, name: str) -> TensorShape:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        if name in (D2T, T2D):
            return torch.int64 if name == D2T else torch.bool
        return self._artifact.dtype(self._sources[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name == D2T:
            return (self._ids - torch.arange(len(self._ids)))[start:stop]
        if name == T2D:
            return torch.zeros(self._vocab_size, dtype=torch.bool).index_fill_(0, self._ids, True)[start:stop]
        return self._artifact.rows(self._sources[name], start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self._artifact.columns(self._sources[name], start, stop)

    def check_shape(self, name: str, shape: TensorShape) -> None:
        assert self.shapes[name] == shape


def _config(config: Config, model: ExportSource, layout: Layout) -> dict[str, Any]:
    assert model.artifact is not None
    exits = model.artifact.config
    assert exits.draft is not None
    size = 0 if exits.ties_output else len(exits.token_ids) or model.model.vocab_size
    described = published_config(
        exits.draft,
        model.model,
        layout,
        draft_vocab_size=size,
        verifier=_verifier(config, model) if layout == "speculators" else "",
        num_steps=_num_steps(model),
    )
    for tree in (described, described.get("transformer_layer_config", {})):
        if "dtype" in tree:
            tree["dtype"] = exits.dtype
    return described


def _verifier(config: Config, model: ExportSource) -> str:
    """Returns the model's folder or name on the hub. Raises InputError where engines can not load it from there."""
    path, adapter, shape = config.model.path, config.model.adapter, config.model.config
    if model.merging:
        more = (f" --adapter {adapter}" if adapter else "") + (f" --config {shape}" if shape else "")
        what = f"{path} is no Hugging Face folder" if adapter is None else f"{path} lacks the weights of {adapter}"
        raise InputError(
            f"--format speculators names the model that engines load with the head, and {what}; write one, `ee-tuning export "
            f"--format hf --model {path}{more} --output FOLDER`, and give --model "
            "FOLDER here"
        )
    name = hub_name(path)
    return str(model.source.folder.resolve()) if name is None or name.revision else path


def _num_steps(model: ExportSource) -> int:
    assert model.artifact is not None
    return (model.artifact.config.tuned or {}).get("ttt_steps", DEFAULT_STEPS)
