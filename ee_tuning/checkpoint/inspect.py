"""`ee-tuning inspect`: what a Hugging Face model folder or an exit-heads artifact holds."""
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from ee_tuning.checkpoint.convert import model_name
from ee_tuning.checkpoint.exit_heads import CONFIG, ExitHeadsReader
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.checkpoint.huggingface import HuggingFaceReader
from ee_tuning.checkpoint.names import backbone_tensor_shapes, embedding_name, exit_tensor_shapes, output_name
from ee_tuning.config import Architecture
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig, read_model_config


def inspect_path(path: Path, *, as_json: bool) -> None:
    """Prints what `path` holds, as a table or as one JSON object. Raises InputError where it is neither kind of folder, or not whole."""
    if (path / CONFIG).is_file():
        facts = artifact_facts(path)
    elif (path / "config.json").is_file():
        facts = model_facts(path)
    else:
        raise InputError(f"inspect takes a Hugging Face model folder (config.json) or an exit-heads artifact ({CONFIG}), and {path} is "
                         f"{'neither' if path.exists() else 'not there'}")
    if as_json:
        print(json.dumps(facts))
        return
    lines = _lines(facts)
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        print(f"{key:{width}}  {value}")


def model_facts(folder: Path) -> dict[str, Any]:
    """A backbone: shape, parameters and bytes per part, fingerprint, and what one exit head would take. Reads no more than headers and a
    few rows. Raises InputError where the weights are not those that config.json describes.
    """
    config = read_model_config(folder)
    with HuggingFaceReader(folder) as reader:
        reader.check_complete(config)
        dtype = reader.dtype(embedding_name(config))
        return {
            "kind": "model", "path": str(folder), "name": model_name(folder), "shape": model_shape(config),
            "dtype": str(dtype).removeprefix("torch."), "rope": _rope(config),
            "max_position_embeddings": config.max_position_embeddings, "parameters": _parameters_by_part(config),
            "bytes": sum(math.prod(shape) * reader.dtype(name).itemsize for name, shape in backbone_tensor_shapes(config).items()),
            "fingerprint": fingerprint(reader, config), "one_exit_head_bytes": _exit_head_bytes(config, dtype.itemsize)}


def artifact_facts(folder: Path) -> dict[str, Any]:
    """An artifact: its exits, what they are bound to, how they began and were tuned, their size; every file's sha256 is checked.

    Raises InputError where a file is missing or altered.
    """
    with ExitHeadsReader(folder) as reader:
        exits = reader.config
        parameters = {name: math.prod(reader.shape(name)) for name in reader.names()}
        return {
            "kind": "exit_heads", "path": str(folder), "exit_layers": list(exits.exit_layers), "architecture": exits.architecture,
            "output": exits.output, "dtype": exits.dtype,
            "bound_to": {"name": exits.model_name, "fingerprint": exits.model_fingerprint, "shape": exits.model_shape},
            "initialized": {"init": exits.init, "seed": exits.seed}, "tuned": exits.tuned,
            "origins": exits.origins,
            "parameters": {**{f"exit {layer}": sum(n for name, n in parameters.items() if name.startswith(f"exits.{layer}."))
                              for layer in exits.exit_layers}, "all": sum(parameters.values())},
            "bytes": sum(file.stat().st_size for file in folder.iterdir()), "integrity": "every sha256 is as the manifest says"}


def _rope(config: ModelConfig) -> dict[str, Any] | None:
    """Kind, theta, and what else its kind sets; None where positions are learned."""
    if config.position == "learned":
        return None
    plain = dataclasses.asdict(type(config.rope)())
    return {key: value for key, value in dataclasses.asdict(config.rope).items() if key in ("kind", "theta") or value != plain[key]}


def _parameters_by_part(config: ModelConfig) -> dict[str, int]:
    sizes = {name: math.prod(shape) for name, shape in backbone_tensor_shapes(config).items()}
    embedding, output = sizes[embedding_name(config)], sizes.get(output_name(config), 0)
    return {"embedding": embedding, "layers": sum(sizes.values()) - embedding - output, "output": output, "all": sum(sizes.values())}


def _exit_head_bytes(config: ModelConfig, width: int) -> dict[str, int]:
    return {f"{architecture}, {'tied' if ties_output else 'untied'}":
            width * sum(map(math.prod, exit_tensor_shapes((1,), architecture, ties_output, config).values()))
            for architecture in get_args(Architecture) for ties_output in (False, True) if not ties_output or architecture != "embedding"}


def _lines(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """One line a fact; what is nested is told by its path."""
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
