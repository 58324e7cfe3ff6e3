"""Writes a shallower model as a plain Hugging Face folder of its family, which any engine runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.huggingface_files import backbone_files, backbone_layout
from ee_tuning.export.companions import companions
from ee_tuning.export.export_source import ExportSource
from ee_tuning.export.folder_writer import copy_files, write_folder
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.huggingface_config import HUGGINGFACE_CLASSES
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.tensor_source import TensorSource


def write_plain_folder(
    model: ExportSource,
    tensors: TensorSource,
    shape: ModelConfig,
    described: Mapping[str, Any],
    card: str,
    output: Path,
    topology: Topology | None,
    tokenizer: Path | None,
) -> None:
    """Writes the model of `shape` that `tensors` holds to `output`, with config.json `described` and README.md `card`.

    All ranks call it and share the files. Tensors keep their dtypes, and the other files are those beside `model`, with
    the tokenizer's of the folder `tokenizer`, if given.
    """
    layout = backbone_layout(tensors, shape)

    def complete(partial: Path) -> None:
        copy_files(companions(model, tokenizer), partial)
        layout.write_index(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        (partial / "config.json").write_text(to_json(described, indent=2) + "\n", encoding="utf-8")

    write_folder(model, backbone_files(tensors, layout), output, topology, complete)


def plain_description(
    model: ExportSource, shape: ModelConfig, layers: Sequence[int], special: Mapping[str, int]
) -> dict[str, Any]:
    """Returns config.json: the backbone's own, with the family's stock class and other layers.

    `layers` holds, for each layer of `shape`, the backbone's layer (1-based) that it is made of. `special` holds token
    ids that the model's own lacks.
    """
    raw = model.described()
    family: dict[str, Any] = {
        "architectures": [HUGGINGFACE_CLASSES[shape.family]],
        "n_layer" if shape.family == "gpt2" else "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": shape.ties_embeddings,
    }
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == model.model.num_layers:
        family["layer_types"] = [kinds[layer - 1] for layer in layers]
    if shape.family == "qwen3_moe":
        family.update(decoder_sparse_step=1, mlp_only_layers=[layer - 1 for layer in shape.dense_layers])
    classes = raw.get("auto_map")
    if isinstance(classes, dict) and "AutoTokenizer" in classes:
        family["auto_map"] = {"AutoTokenizer": classes["AutoTokenizer"]}
    kept = {key: value for key, value in raw.items() if key not in ("early_exit", "auto_map")}
    missing = {key: token for key, token in special.items() if kept.get(key) is None}
    return {**kept, **missing, **family}
