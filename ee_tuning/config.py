"""One YAML per job: frozen dataclasses, strict both ways, overridden by `--set section.key=value`.

The same file drives convert, tune and generate; a command reads the sections it needs. Keys are Megatron's where Megatron has them.
"""
import contextlib
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ee_tuning.errors import InputError

Architecture = Literal["norm", "mlp"]
DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The backbone."""

    path: str = ""
    """Folder of the model: Hugging Face's, a Megatron checkpoint or a run's folder of them; or org/name on the Hugging Face hub."""
    config: str | None = None
    """Shape of a Megatron checkpoint whose saved arguments are missing or lack something: a Hugging Face config.json, or YAML with
    Megatron's names."""
    trust_pickle: bool = False
    """Unpickle a Megatron checkpoint whatever its pickles ask for: they may run anything."""
    dtype: DType | None = None
    """Precision of the frozen weights and activations; default float32 on CPU, bfloat16 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class ExitsSection:
    """The exit heads: an artifact that exists, or what to make."""

    path: str | None = None
    """Exit-heads artifact to start from. Without it, `tune` converts by itself from the other keys."""
    exit_layers: tuple[int, ...] = ()
    """Backbone layers (1-based, increasing) that are followed by an exit head."""
    architecture: Architecture = "mlp"
    """norm: final norm and output matrix. mlp: layer l's MLP, trained anew, before them."""
    init: Literal["copy", "random"] = "copy"
    """copy: from the backbone's own norm, MLP and output matrix. random: as the model was initialized."""
    output: Literal["untied", "tied"] = "untied"
    """untied: each exit trains its own output matrix. tied: the backbone's frozen one."""
    seed: int = 1234
    """Of random initialization."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How the model is laid out. Data parallelism is what remains of the world."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages, one after the other, that the layers are divided into."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What the heads are tuned on."""

    paths: tuple[str, ...] = ()
    """Text files, .jsonl files (one object with a text a line), or folders of either."""
    text_key: str = "text"
    """Key of the text in a .jsonl line."""
    tokenizer: str | None = None
    """Folder of the tokenizer; default the model's."""
    valid_paths: tuple[str, ...] = ()
    """Held-out files. Without them, valid_fraction of the documents is held out."""
    valid_fraction: float = 0.05
    """Share of the documents held out for validation, chosen by a hash of the document."""


@dataclass(frozen=True, kw_only=True)
class TuningSection:
    """The tuner."""

    run_folder: str = "runs/tune"
    """Where checkpoints, metrics and the tuned artifact go."""
    train_iters: int = 1000
    """Optimizer steps in all."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one data-parallel replica."""
    global_batch_size: int = 16
    """Sequences per optimizer step over all replicas."""
    seq_length: int = 2048
    """Tokens per sequence."""
    lr: float = 1e-4
    """Largest learning rate."""
    min_lr: float = 1e-5
    """The cosine or linear decay ends here."""
    lr_warmup_fraction: float = 0.01
    """Share of train_iters over which the learning rate rises from zero."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-5
    clip_grad: float = 1.0
    """Largest gradient norm of one exit head; 0 leaves gradients as they are."""
    loss_weights: tuple[float, ...] = ()
    """One per exit; default 1 each. With separate heads, clip and Adam they nearly cancel; weight 0 freezes that exit."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    seed: int = 1234
    """Of the order of the samples."""
    log_interval: int = 1
    """Steps between records in metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 for none but those before the first step and after the last."""
    eval_iters: int = 8
    """Micro-batches per replica in one validation; 0 for no validation."""
    save_interval: int = 500
    """Steps between checkpoints; the end of a run always saves. 0 for the end alone."""
    keep_checkpoints: int = 2
    """Older checkpoints than this many are removed."""
    resume: bool = False
    """Continue from the run folder's latest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """The decoder."""

    policy: Literal["full", "threshold", "fixed"] = "threshold"
    """full: never exits. threshold: leaves at the first exit that is confident enough. fixed: always at exit_layer."""
    threshold: float = 0.8
    """Confidence (largest probability) at which a token leaves. Above 1 never."""
    exit_layer: int | None = None
    """The exit of the policy `fixed`."""
    max_new_tokens: int = 100
    """A completion ends after so many tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that reach this probability together."""
    seed: int = 0
    """Of sampling, per prompt: the same seed gives a prompt the same tokens in any batch."""
    stop: tuple[str, ...] = field(default=(), metadata={"verbatim": True})
    """Strings that end a completion; they are left out of it."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""
    max_pending: int = 16
    """Tokens that may wait for their deeper keys and values before the deep layers run for all of them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole job."""

    model: ModelSection = field(default_factory=ModelSection)
    exits: ExitsSection = field(default_factory=ExitsSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    tuning: TuningSection = field(default_factory=TuningSection)
    generation: GenerationSection = field(default_factory=GenerationSection)


def load_config(path: str | Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """The job in the YAML file at `path` (defaults where None), with `overrides` {"section.key": value} laid over it.

    Values of overrides may be strings as typed at a prompt; they are read as YAML where the key is no text. Raises InputError on a
    file that is missing or not YAML, on unknown sections and keys, and on values of another type or outside their choices.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if not key:
            raise InputError(f"an override is section.key=value, got {dotted!r}; for example tuning.lr=1e-4")
        keys = {} if tree.get(section) is None else tree[section]
        if isinstance(keys, dict):
            tree[section] = {**keys, key: _as_typed(value, _hint(section, key))}
    where = " and ".join([str(path)] * (path is not None) + ["the command line"] * bool(overrides)) or "the defaults"
    return _build(Config, tree, where, "")


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved job, every key spelled out, as YAML that `load_config` reads back to an equal Config."""
    path.write_text(yaml.safe_dump(_plain(config), sort_keys=False))


def replace(config: Config, **sections: Any) -> Config:
    """`config` with keys of sections replaced: replace(config, tuning={"lr": 1e-3})."""
    changed = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **changed)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"the config file {path} can not be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold sections such as `model:` and `tuning:`, got {type(tree).__name__}")
    return tree


def _hint(section: str, key: str) -> Any:
    kind = typing.get_type_hints(Config).get(section)
    return typing.get_type_hints(kind).get(key) if kind else None


def _as_typed(value: Any, hint: Any) -> Any:
    """A value typed at a prompt. Texts stay as they are: a folder may be called 007 or on, which YAML reads as 7 and true."""
    if isinstance(value, list):
        return [_as_typed(item, next(iter(typing.get_args(hint)), None)) for item in value]
    is_text = hint is str or (str in typing.get_args(hint) and value != "null" and not str(value).startswith("["))
    return value if is_text else _parse_scalar(value)


def _parse_scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _build(kind: type, tree: Any, where: str, prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(tree, dict):
        raise InputError(f"{where}: {prefix.rstrip('.')} must hold keys, got {tree!r}; known keys: {', '.join(known)}")
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise InputError(f"{where}: unknown key {prefix}{key}; {hint}known keys: {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    # A lone text is one item where items may hold commas and spaces.
    tree = {key: [value] if isinstance(value, str) and known[key].metadata.get("verbatim") else value for key, value in tree.items()}
    return kind(**{key: _convert(value, hints[key], where, prefix + key) for key, value in tree.items()})


def _convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """`value` as the type `hint` says, or InputError."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value if value is not None else {}, where, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
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
    if isinstance(value, bool) == (hint is bool) and isinstance(value, (int, float) if hint is float else hint):
        if value != value:
            raise InputError(f"{where}: {name} must be a number, got nan")
        return hint(value)
    raise InputError(f"{where}: {name} must be {words[hint]}, got {value!r}")


def _split(value: Any, item: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, str):
        return [value]
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return parts if item is str else [_parse_scalar(part) for part in parts]
