"""`ee-tuning inspect`: describes a model in any supported format, or an exit-heads artifact."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import torch

from ee_tuning.artifact.convert import model_name
from ee_tuning.artifact.exit_config import CONFIG, exit_config_tree
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.artifact.exit_names import exit_tensor_shapes
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.checkpoint.formats import FORMATS, has_weights, model_folder, open_model
from ee_tuning.checkpoint.model_size import largest_group_parameters, parameters_by_part, parameters_per_layer
from ee_tuning.checkpoint.names import backbone_tensor_shapes, embedding_name
from ee_tuning.config import Architecture, ExitsSection, ModelSection
from ee_tuning.json_file import to_json
from ee_tuning.model.draft_spec import can_draft, draft_spec
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.storage.missing_weights import other_weights


def inspect_path(path: Path, *, as_json: bool, config: str | None = None, trust_pickle: bool = False) -> None:
    """Prints the facts about `path` as a table or as one JSON object. `config` and `trust_pickle` are as in the model
    section.

    Raises InputError where it is neither a complete model nor an exit-heads artifact.
    """
    # A distributed checkpoint may hold exits beside its model.
    is_artifact = (path / CONFIG).is_file() and not (path / ".metadata").is_file()
    facts = artifact_facts(path) if is_artifact else model_facts(path, config=config, trust_pickle=trust_pickle)
    if as_json:
        print(to_json(facts))
        return
    lines = _lines(facts)
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        print(f"{key:{width}}  {value}")


def model_facts(path: Path, *, config: str | None = None, trust_pickle: bool = False) -> dict[str, Any]:
    """Returns the facts about a backbone: format, shape, parameters and bytes per part, fingerprint, and the cost of
    one exit.

    Reads only headers and a few rows, or just the config.json where nothing else exists. Raises InputError where the
    weights do not match its shape.
    """
    folder = model_folder(str(path))
    if not has_weights(folder):
        others = ", ".join(other_weights(folder)[:3])
        weights = f"its weights ({others}) are in a form that is not read" if others else "weights are missing"
        return {
            "kind": "model",
            "format": f"only config.json: {weights}, and sizes are computed from the shape",
            "path": str(folder),
            "name": model_name(folder),
            **_described(model := read_model_config(folder), model.stored_dtype),
        }
    reader, model, kind = open_model(ModelSection(path=str(path), config=config, trust_pickle=trust_pickle))
    with reader:
        reader.check_complete(model)
        dtype = reader.dtype(embedding_name(model))
        return {
            "kind": "model",
            "format": FORMATS[kind],
            "path": str(reader.folder),
            "name": model_name(reader.folder),
            **_described(model, str(dtype).removeprefix("torch.")),
            "bytes": sum(
                math.prod(shape) * reader.dtype(name).itemsize for name, shape in backbone_tensor_shapes(model).items()
            ),
            "fingerprint": fingerprint(reader, model),
        }


def artifact_facts(folder: Path) -> dict[str, Any]:
    """Returns the facts about an artifact: exits, model, initialization and tuning, size. Checks every file's sha256.

    Raises InputError where a file is missing or altered.
    """
    with ExitHeadsReader(folder) as reader:
        exits = reader.config
        parameters = {name: math.prod(reader.shape(name)) for name in reader.names()}
        return {
            "kind": "exit_heads",
            "path": str(folder),
            "exit_layers": list(exits.exit_layers),
            "architecture": exit_config_tree(exits)["architecture"],
            "adapter_rank": exits.adapter_rank,
            "output": exits.output,
            "dtype": exits.dtype,
            "bound_to": {"name": exits.model_name, "fingerprint": exits.model_fingerprint, "shape": exits.model_shape},
            "initialized": {"init": exits.init, "seed": exits.seed, "fitted": exits.fitted},
            "tuned": exits.tuned,
            "adds_linear": list(exits.adds_linear) or None,
            "output_vocab": exits.output_vocab,
            "origins": exits.origins,
            "parameters": {
                **{
                    f"exit {layer}": sum(n for name, n in parameters.items() if name.startswith(f"exits.{layer}."))
                    for layer in exits.exit_layers
                },
                "all": sum(parameters.values()),
            },
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "integrity": "every sha256 is as the manifest says",
        }


def _described(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the facts that follow from the shape, for weights in `dtype`."""
    parameters, width = parameters_by_part(model), getattr(torch, dtype).itemsize
    return {
        "shape": model_shape(model),
        "dtype": dtype,
        "rope": _rope(model),
        "max_position_embeddings": model.max_position_embeddings,
        "parameters": {**parameters, **parameters_per_layer(model)},
        "bytes": width * parameters["all"],
        "largest_group_bytes": width * largest_group_parameters(model),
        "one_exit_head_bytes": _exit_head_bytes(model, width),
    }


def _rope(config: ModelConfig) -> dict[str, Any] | None:
    """Returns kind, theta and the kind's other fields, or None for learned positions."""
    if config.position == "learned":
        return None
    plain = dataclasses.asdict(type(config.rope)())
    return {
        key: value
        for key, value in dataclasses.asdict(config.rope).items()
        if key in ("kind", "theta") or value != plain[key]
    }


def _exit_head_bytes(config: ModelConfig, width: int) -> dict[str, int]:
    def num_parameters(architecture: Architecture, ties_output: bool) -> int:
        spec = ExitSpec(
            layer=1,
            architecture=architecture,
            ties_output=ties_output,
            adapter_rank=ExitsSection.adapter_rank,
            draft=draft_spec(config, (0, 1, 2)) if architecture == "eagle3" else None,
        )
        return sum(map(math.prod, exit_tensor_shapes((spec,), config).values()))

    return {
        f"{architecture}, {'tied' if ties_output else 'untied'}": width * num_parameters(architecture, ties_output)
        for architecture in get_args(Architecture)
        for ties_output in (False, True)
        if not (ties_output and architecture == "embedding")
        and not (config.num_experts and architecture == "mlp")
        and not (architecture == "eagle3" and (not can_draft(config) or config.num_layers < 2))  # it reads three states
    }


def _lines(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns one line per fact. Nested facts are named by their path."""
    lines = []
    for key, value in facts.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            lines += _lines(value, f"{name} · ")
        elif isinstance(value, list):
            lines.append((name, ", ".join(map(str, value))))
        elif value is not None:
            is_count = isinstance(value, int) and not isinstance(value, bool) and key != "seed"
            lines.append((name, f"{value:,}" if is_count else str(value)))
    return lines
