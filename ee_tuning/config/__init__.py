"""A job's configuration: frozen dataclasses in one YAML file, parsed strictly, with overrides `--set
section.key=value`.

The same file drives all commands; each reads the sections it needs. Keys have Megatron's names where Megatron has them.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ee_tuning.config.data import DataSection
from ee_tuning.config.depth_sampling import DepthSampling
from ee_tuning.config.generation import GenerationSection, without_overruled
from ee_tuning.config.model import Architecture, DType, ExitsSection, ModelSection, ParallelSection
from ee_tuning.config.output_vocab import AutoVocab
from ee_tuning.config.paths import expanded, split_paths
from ee_tuning.config.placement import AutoLayers
from ee_tuning.config.trainable import Trainable
from ee_tuning.config.tuning import TeacherPlan, TuningSection, WeightFormat
from ee_tuning.errors import InputError
from ee_tuning.yaml_file import parse_yaml

__all__ = [
    "INTEGER_LIMIT",
    "Architecture",
    "Config",
    "DType",
    "DataSection",
    "DepthSampling",
    "ExitsSection",
    "GenerationSection",
    "ModelSection",
    "ParallelSection",
    "TeacherPlan",
    "Trainable",
    "TuningSection",
    "WeightFormat",
    "load_config",
    "replace",
    "save_config",
]

INTEGER_LIMIT = 2**63
"""Whole numbers, without their sign, are smaller: torch's integers have 64 bits."""
_GROUPED = re.compile(r"-?[1-9][0-9]*(_[0-9]+)+")
"""1_000."""
_MAY_BE_INFINITE = ("generation.threshold",)
"""Keys that may be infinite: a threshold that no confidence reaches."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole job."""

    model: ModelSection = field(default_factory=ModelSection)
    exits: ExitsSection = field(default_factory=ExitsSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    tuning: TuningSection = field(default_factory=TuningSection)
    generation: GenerationSection = field(default_factory=GenerationSection)


def load_config(
    path: str | Path | None, overrides: dict[str, Any] | None = None, defaults: Mapping[str, Any] | None = None
) -> Config:
    """Loads the job from the YAML file `path`, or only defaults if None. `overrides` {"section.key": value} take
    precedence.

    `defaults` replace the defaults of keys. Values of overrides may be strings as typed at a prompt; they are read as
    YAML unless the key is a text. Raises InputError on a missing or invalid file, on unknown or duplicate sections and
    keys, and on values of a wrong type, outside of their choices, or too large.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    if isinstance(tree.get("generation"), dict):
        tree["generation"] = without_overruled(
            tree["generation"], [name.removeprefix("generation.") for name in overrides or {}]
        )
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise InputError(f"an override is section.key=value, got {dotted!r}; for example tuning.lr=1e-4")
        keys = {} if tree.get(section) is None else tree[section]
        if isinstance(keys, dict):
            tree[section] = {**keys, key: _as_typed(value, _hint(section, key))}
    for dotted, value in (defaults or {}).items():
        section, _, key = dotted.partition(".")
        if isinstance(keys := {} if tree.get(section) is None else tree[section], dict):
            tree[section] = {key: value, **keys}
    where = " and ".join([str(path)] * (path is not None) + ["the command line"] * bool(overrides)) or "the defaults"
    return _build(Config, tree, where, "")


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved job, with every key, as YAML that `load_config` reads back to an equal Config."""
    path.write_text(yaml.safe_dump(_plain(config), sort_keys=False), encoding="utf-8")


def replace(config: Config, **sections: Any) -> Config:
    """Returns `config` with keys of sections replaced: replace(config, tuning={"lr": 1e-3})."""
    changed = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **changed)


def _plain(value: Any) -> Any:
    if isinstance(value, AutoLayers | AutoVocab):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the config file {path} can not be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold sections such as `model:` and `tuning:`, got {type(tree).__name__}")
    return tree


def _hint(section: str, key: str) -> Any:
    kind = typing.get_type_hints(Config).get(section)
    return typing.get_type_hints(kind).get(key) if kind else None


def _as_typed(value: Any, hint: Any) -> Any:
    """Parses a value typed at a prompt. Texts stay as they are: a folder may be called 007 or on, which YAML reads as 7
    and true.
    """
    if isinstance(value, list):
        return [_as_typed(item, next(iter(typing.get_args(hint)), None)) for item in value]
    is_text = hint is str or (str in typing.get_args(hint) and value != "null" and not str(value).startswith("["))
    return value if is_text else _parse_scalar(value)


def _parse_scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_yaml(value)
    except ValueError:
        return value


def _build(kind: type, tree: Any, where: str, prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(tree, dict):
        raise InputError(f"{where}: {prefix.rstrip('.')} must hold keys, got {tree!r}; known keys: {', '.join(known)}")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise InputError(
                f"{where}: unknown key {prefix}{key}; "
                + (f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}")
            )
    hints = typing.get_type_hints(kind)
    tree = {key: _items(value, hints[key], known[key].metadata) for key, value in tree.items()}
    values = {key: _convert(value, hints[key], where, prefix + key) for key, value in tree.items()}
    return kind(
        **{
            key: _with_paths(value, prefix + key) if known[key].metadata.get("path") else value
            for key, value in values.items()
        }
    )


def _items(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A single text is one item where items may contain commas and spaces."""
    if isinstance(value, str) and metadata.get("verbatim"):
        return [value]
    return (
        split_paths(value)
        if isinstance(value, str) and metadata.get("path") and typing.get_origin(hint) is tuple
        else value
    )


def _with_paths(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        return tuple(expanded(item, name) for item in value)
    return expanded(value, name) if isinstance(value, str) else value


def _convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """Converts `value` to the type `hint`, or raises InputError."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value if value is not None else {}, where, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        lone = value[0] if isinstance(value, list) and len(value) == 1 else value
        for kind in arguments:  # a word that stands for a value of a special type
            if isinstance(lone, str) and hasattr(kind, "read") and (found := kind.read(lone)) is not None:
                return found
        return _convert(value, next(a for a in arguments if a is not type(None)), where, name)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where}: {name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else _split(value, arguments[0])
        return tuple(_convert(item, arguments[0], where, name) for item in items)
    return _convert_scalar(value, hint, where, name)


def _convert_scalar(value: Any, hint: type, where: str, name: str) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is int and isinstance(value, str) and _GROUPED.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) == (hint is bool) and isinstance(value, (int, float) if hint is float else hint):
        if value != value:
            raise InputError(f"{where}: {name} must be a number, got nan")
        if isinstance(value, float) and math.isinf(value) and name not in _MAY_BE_INFINITE:
            raise InputError(f"{where}: {name} must be a number, got {value}, which is not finite")
        if hint is int and isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
            raise InputError(f"{where}: {name} must be a whole number below 2^63, got one of {value.bit_length()} bits")
        try:
            return hint(value)
        except OverflowError as error:  # an integer of hundreds of digits
            assert isinstance(value, int)
            raise InputError(
                f"{where}: {name} must be a number that a float can hold, got one of {value.bit_length()} bits"
            ) from error
    raise InputError(f"{where}: {name} must be {words[hint]}, got {value!r}")


def _split(value: Any, item: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, str):
        return [value]
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return parts if item is str else [_parse_scalar(part) for part in parts]
