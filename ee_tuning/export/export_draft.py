"""Exports one exit as a plain Hugging Face folder: a shallow model of the backbone's family, which any engine runs.

It drafts for the whole model or serves on its own, without code of this project.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from ee_tuning.artifact.exit_config import exit_config_tree
from ee_tuning.checkpoint.huggingface_files import backbone_files, backbone_layout
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.export.companions import companions
from ee_tuning.export.draft_card import draft_card, pruned_card
from ee_tuning.export.export_source import ExportSource, check_target, open_for_export
from ee_tuning.export.folded_output import PlainExitTensors
from ee_tuning.export.folder_writer import copy_files, write_folder
from ee_tuning.export.plain_exit import PlainExit, plain_exit
from ee_tuning.json_file import to_json
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.huggingface_config import HUGGINGFACE_CLASSES
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

_MARKS = ("config.json", "model*.safetensors*")
"""File patterns that identify an export of this format."""
PlainFormat = Literal["draft", "pruned"]
"""The files are the same; the card describes their purpose."""


def export_draft(
    config: Config,
    output: Path,
    exit_layer: int,
    topology: Topology | None = None,
    *,
    kind: PlainFormat = "draft",
    overwrite: bool = False,
    special: Mapping[str, int] = MappingProxyType({}),
    constant: Tensor | None = None,
) -> None:
    """Writes the exit of exits.path after `exit_layer`, with the layers of model.path below it, to `output`.

    All ranks call it and share the files. Tensors keep their dtypes. `special` holds token ids for config.json that the
    model's own lacks. `constant` is the u of `folded_output.py`, by which a bias is folded approximately. Raises
    InputError where the exit is no plain model, model and exits do not belong together, or `output` can not be written;
    nothing is left behind then.
    """
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
    on_first_rank(topology, lambda: check_target(config, output, overwrite, _MARKS))
    with open_for_export(config, topology) as model:
        assert model.artifact is not None
        plain = plain_exit(chosen_exit(model.artifact.config.heads, exit_layer, str(config.exits.path)), model.model)
        tensors = PlainExitTensors(plain, model.source, model.artifact, constant)
        layout = backbone_layout(tensors, plain.config)
        described = plain_description(model, plain, special)

        def complete(partial: Path) -> None:
            copy_files(companions(model, tokenizer), partial)
            if index := layout.index():
                (partial / index[0]).write_text(index[1], encoding="utf-8")
            assert model.artifact is not None
            tree = exit_config_tree(model.artifact.config)
            make_card = draft_card if kind == "draft" else pruned_card
            card = make_card(model.name, plain, tree, model.model.num_layers, is_nearly=constant is not None)
            (partial / "README.md").write_text(card, encoding="utf-8")
            (partial / "config.json").write_text(to_json(described, indent=2) + "\n", encoding="utf-8")

        write_folder(model, backbone_files(tensors, layout), output, topology, complete)


def chosen_exit(heads: tuple[ExitSpec, ...], exit_layer: int, artifact: str) -> ExitSpec:
    """Returns the exit after `exit_layer`. Raises InputError where the artifact has none there."""
    for head in heads:
        if head.layer == exit_layer:
            return head
    raise InputError(
        f"--exit must be a layer that an exit of {artifact} follows, got {exit_layer}; it has "
        f"{', '.join(str(head.layer) for head in heads)}"
    )


def plain_description(model: ExportSource, plain: PlainExit, special: Mapping[str, int]) -> dict[str, Any]:
    """Returns config.json: the backbone's own, with fewer layers and the family's stock class."""
    shape, raw = plain.config, model.described()
    family: dict[str, Any] = {
        "architectures": [HUGGINGFACE_CLASSES[shape.family]],
        "n_layer" if shape.family == "gpt2" else "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": shape.ties_embeddings,
    }
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == model.model.num_layers:
        family["layer_types"] = kinds[: plain.head.layer] + kinds[-1:] * (shape.num_layers - plain.head.layer)
    if shape.family == "qwen3_moe":
        family.update(decoder_sparse_step=1, mlp_only_layers=[layer - 1 for layer in shape.dense_layers])
    classes = raw.get("auto_map")
    if isinstance(classes, dict) and "AutoTokenizer" in classes:
        family["auto_map"] = {"AutoTokenizer": classes["AutoTokenizer"]}
    kept = {key: value for key, value in raw.items() if key not in ("early_exit", "auto_map")}
    missing = {key: token for key, token in special.items() if kept.get(key) is None}
    return {**kept, **missing, **family}
