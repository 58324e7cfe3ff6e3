"""Flags of the command line. Each stands for a config key, and its help is the documentation of that key.

`FLAGS` is the only table. Values are not checked here: `load_config` gets them as overrides, with the same rules for
YAML, `--set` and flags.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from ee_tuning.config import Config
from ee_tuning.config.paths import split_paths
from ee_tuning.errors import InputError
from ee_tuning.utf8 import typed_text

_MODEL = {
    "--model": "model.path",
    "--config": "model.config",
    "--adapter": "model.adapter",
    "--trust-pickle": "model.trust_pickle",
    "--dtype": "model.dtype",
}
_HEADS = {"--architecture": "exits.architecture", "--adapter-rank": "exits.adapter_rank", "--init": "exits.init"}
_DRAFTS = {"--aux-layers": "exits.aux_layers"}
_TOKENIZER = {"--tokenizer": "data.tokenizer", "--trust-remote-code": "model.trust_remote_code"}
_NEW_EXITS = {
    "--exit-layers": "exits.exit_layers",
    **_HEADS,
    **_DRAFTS,
    "--exit-output": "exits.output",
    "--output-vocab": "exits.output_vocab",
    "--profile-text": "exits.profile_text",
}
_EXITS = {"--exits": "exits.path", "--no-verify": "exits.verify"}
_PARALLEL = {
    "--tensor-model-parallel-size": "parallel.tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "parallel.pipeline_model_parallel_size",
}
_TUNING_LAYOUT = {**_PARALLEL, "--sequence-parallel": "parallel.sequence_parallel"}
_TUNING = {
    "--data": "data.paths",
    **_TOKENIZER,
    "--chat-template": "data.chat_template",
    "--output": "tuning.run_folder",
    "--train-iters": "tuning.train_iters",
    "--lr": "tuning.lr",
    "--seq-length": "tuning.seq_length",
    "--micro-batch-size": "tuning.micro_batch_size",
    "--global-batch-size": "tuning.global_batch_size",
    "--seed": "tuning.seed",
    "--loss": "tuning.loss",
    "--trainable": "tuning.trainable",
    "--teacher-model": "tuning.teacher_model",
    "--fit-tokens": "tuning.fit_tokens",
    "--resume": "tuning.resume",
    "--no-resume": "tuning.resume",
    "--allow-config-change": "tuning.allow_config_change",
}
_POLICY = {
    "--policy": "generation.policy",
    "--threshold": "generation.threshold",
    "--measure": "generation.measure",
    "--calibration": "generation.calibration",
    "--exit-layer": "generation.exit_layer",
    "--budget": "generation.budget",
}
_SAMPLING = {
    "--max-new-tokens": "generation.max_new_tokens",
    "--temperature": "generation.temperature",
    "--top-k": "generation.top_k",
    "--top-p": "generation.top_p",
    "--min-p": "generation.min_p",
    "--repetition-penalty": "generation.repetition_penalty",
    "--presence-penalty": "generation.presence_penalty",
    "--frequency-penalty": "generation.frequency_penalty",
    "--seed": "generation.seed",
    "--stop": "generation.stop",
}

_BOTH_HEADS = {
    "--contrast-layers": "generation.contrast_layers",
    "--fuse-layer": "generation.fuse_layer",
    "--fuse-weight": "generation.fuse_weight",
}

FLAGS: dict[str, dict[str, str]] = {
    "convert": {
        **_MODEL,
        **_NEW_EXITS,
        "--data": "data.paths",
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        "--fit-tokens": "tuning.fit_tokens",
        "--seq-length": "tuning.seq_length",
        "--micro-batch-size": "tuning.micro_batch_size",
        "--seed": "exits.seed",
        "--no-verify": "exits.verify",
        **_TUNING_LAYOUT,
    },
    "preprocess": {
        "--data": "data.paths",
        **_TOKENIZER,
        "--text-key": "data.text_key",
        "--chat-template": "data.chat_template",
        "--workers": "data.workers",
    },
    "tune": {**_MODEL, **_EXITS, **_NEW_EXITS, **_TUNING, **_TUNING_LAYOUT},
    "plan": {**_MODEL, **_EXITS, **_NEW_EXITS, **_TUNING, **_TUNING_LAYOUT},
    "advise": {key: _MODEL[key] for key in ("--model", "--config", "--trust-pickle")},
    "profile": {**_MODEL, "--no-verify": "exits.verify", "--text": "exits.profile_text", **_TOKENIZER},
    "prune": {**_MODEL, **_EXITS, "--data": "data.valid_paths", **_TOKENIZER, **_PARALLEL},
    "compare": {
        **{flag: key for flag, key in _MODEL.items() if flag != "--adapter"},
        "--no-verify": "exits.verify",
        "--data": "data.paths",
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        "--exit-layers": "exits.exit_layers",
        "--architecture": "exits.architecture",
        "--exit-output": "exits.output",
        "--output-vocab": "exits.output_vocab",
        "--seq-length": "tuning.seq_length",
        "--micro-batch-size": "tuning.micro_batch_size",
        "--global-batch-size": "tuning.global_batch_size",
        "--seed": "tuning.seed",
        "--max-new-tokens": "generation.max_new_tokens",
        "--stop": "generation.stop",
        **_PARALLEL,
    },
    "export": {**_MODEL, **_EXITS, **_TOKENIZER, **_HEADS, "--seed": "exits.seed"},
    "calibrate": {
        **_MODEL,
        **_EXITS,
        "--data": "data.valid_paths",
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        "--max-new-tokens": "generation.max_new_tokens",
        "--stop": "generation.stop",
        "--max-batch-size": "generation.max_batch_size",
        **_PARALLEL,
    },
    "evaluate": {
        **_MODEL,
        **_EXITS,
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        "--measure": "generation.measure",
        "--max-new-tokens": "generation.max_new_tokens",
        "--stop": "generation.stop",
        "--stop-token-ids": "generation.stop_token_ids",
        "--max-batch-size": "generation.max_batch_size",
        **_PARALLEL,
    },
    "generate": {
        **_MODEL,
        **_EXITS,
        **_TOKENIZER,
        **_POLICY,
        **_BOTH_HEADS,
        **_SAMPLING,
        "--min-new-tokens": "generation.min_new_tokens",
        "--n": "generation.n",
        "--logprobs": "generation.logprobs",
        "--stop-token-ids": "generation.stop_token_ids",
        "--ignore-eos": "generation.ignore_eos",
        "--max-batch-size": "generation.max_batch_size",
        "--cache-tokens": "generation.cache_tokens",
        **_PARALLEL,
    },
    "regenerate": {
        **_MODEL,
        "--no-verify": "exits.verify",
        "--data": "data.paths",
        "--text-key": "data.text_key",
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        "--n": "generation.n",
        **_SAMPLING,
        "--max-batch-size": "generation.max_batch_size",
        "--cache-tokens": "generation.cache_tokens",
        **_PARALLEL,
    },
    "chat": {
        **_MODEL,
        **_EXITS,
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        **_POLICY,
        **_BOTH_HEADS,
        **_SAMPLING,
    },
    "serve": {
        **_MODEL,
        **_EXITS,
        **_TOKENIZER,
        "--chat-template": "data.chat_template",
        **_POLICY,
        **_BOTH_HEADS,
        "--temperature": "generation.temperature",
        "--top-k": "generation.top_k",
        "--top-p": "generation.top_p",
        "--min-p": "generation.min_p",
        "--max-batch-size": "generation.max_batch_size",
        "--cache-tokens": "generation.cache_tokens",
        "--no-reuse-prefixes": "generation.reuse_prefixes",
        **_PARALLEL,
    },
}
"""Command -> flag -> config key. A flag `--no-…` sets its key to false; another flag without a value sets it to
true.
"""

DEFAULTS: dict[str, dict[str, Any]] = {
    "regenerate": {"generation.max_new_tokens": 1024},
    "evaluate": {"generation.max_batch_size": 1},
    "compare": {
        "generation.max_batch_size": 1,
        "generation.max_new_tokens": 64,
        "tuning.global_batch_size": 4,
    },
    "serve": {"generation.temperature": 1.0},
}
"""Command -> config key -> default, where it differs from the key's own."""

_NOT = "--no-"
_METAVARS = {
    "model.path": "FOLDER",
    "model.config": "FILE",
    "model.adapter": "FOLDER",
    "tuning.teacher_model": "FOLDER",
    "exits.path": "FOLDER",
    "data.tokenizer": "FOLDER",
    "data.chat_template": "FILE|NAME",
    "generation.calibration": "FILE",
    "data.valid_paths": "PATH",
    "tuning.run_folder": "FOLDER",
    "data.paths": "PATH",
    "exits.profile_text": "FILE",
    "exits.output_vocab": "N|auto",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """The properties of a config key."""

    kind: Any
    """Its type, without the None of an optional key."""
    is_list: bool
    default: Any
    doc: str
    is_verbatim: bool
    """Whether items of the list may contain commas: then a flag gives one item, and may be repeated."""
    is_path: bool


def add_config_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the flags of `command`, and `--set`. Their values arrive, in order, in the namespace's `overrides`."""
    parser.set_defaults(overrides={})
    for flag, name in FLAGS[command].items():
        key = config_keys()[name]
        options: dict[str, Any] = {
            "action": _Override,
            "key": name,
            "help": _help(flag, name, key, command),
            "metavar": _metavar(name, key),
        }
        if key.kind is bool:
            options["nargs"] = 0
        elif key.is_list and not key.is_verbatim:
            options["nargs"] = "+"
        parser.add_argument(flag, **options)
    parser.add_argument(
        "--set",
        action=_Override,
        key=None,
        metavar="SECTION.KEY=VALUE",
        help="any key of the config, for example tuning.adam_beta2=0.99; repeatable",
    )


class _Override(argparse.Action):
    """Stores the flag's value under its config key. A later value replaces an earlier one, or is appended to a list."""

    def __init__(self, *args: Any, key: str | None, **options: Any) -> None:
        super().__init__(*args, **{**options, "default": argparse.SUPPRESS})
        self.key = key

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        overrides = namespace.overrides = dict(namespace.overrides)  # the default dict is shared by all parses
        if self.key is None:
            name, equals, value = str(values).partition("=")
            if not equals:
                raise InputError(f"--set takes section.key=value, got {values!r}; for example --set tuning.lr=1e-4")
            overrides[name.strip()] = value
        elif self.nargs == 0:
            overrides[self.key] = not str(option_string).startswith(_NOT)
        elif config_keys()[self.key].is_verbatim:
            overrides[self.key] = [*_items(overrides.get(self.key)), typed_text(str(values))]
        elif isinstance(values, list):
            split = split_paths if config_keys()[self.key].is_path else _split
            words = [part for word in values for part in split(word)]
            overrides[self.key] = [*_items(overrides.get(self.key)), *words]
        else:
            overrides[self.key] = values


def _split(word: str) -> list[str]:
    return [part.strip() for part in word.split(",") if part.strip()]


def _items(value: Any) -> list[Any]:
    """Returns the items of earlier flags. A value of --set is replaced."""
    return value if isinstance(value, list) else []


@functools.cache
def config_keys() -> dict[str, Key]:
    """Returns every key "section.key" of the config, with the documentation below it."""
    keys = {}
    for section, kind in typing.get_type_hints(Config).items():
        hints, documented = typing.get_type_hints(kind), _documented_fields(kind)
        for field in dataclasses.fields(kind):
            hint, is_list = hints[field.name], False
            if typing.get_origin(hint) in (types.UnionType, typing.Union):
                hint = next(part for part in typing.get_args(hint) if part is not type(None))
            if typing.get_origin(hint) is tuple:
                hint, is_list = typing.get_args(hint)[0], True
            doc = documented.get(field.name, "")
            keys[f"{section}.{field.name}"] = Key(
                kind=hint,
                is_list=is_list,
                default=field.default,
                doc=doc,
                is_verbatim=bool(field.metadata.get("verbatim")),
                is_path=bool(field.metadata.get("path")),
            )
    return keys


def _documented_fields(kind: type) -> dict[str, str]:
    """Returns, per field of a section, the string below it. Python does not keep such strings, so the source is
    parsed.
    """
    found = {}
    body = next(
        node.body
        for node in ast.parse(inspect.getsource(sys.modules[kind.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    for field, beneath in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(beneath, ast.Expr)
            and isinstance(beneath.value, ast.Constant)
        ):
            found[field.target.id] = inspect.cleandoc(str(beneath.value.value))
    return found


def _help(flag: str, name: str, key: Key, command: str) -> str:
    key = dataclasses.replace(key, default=DEFAULTS.get(command, {}).get(name, key.default))
    if flag.startswith(_NOT):
        return f"set to false: {key.doc[0].lower()}{key.doc[1:]} [{name}, default {key.default}]".replace("%", "%%")
    default = "" if key.default in (None, "", ()) or key.default is False else f", default {_plain(key.default)}"
    return f"{key.doc} [{name}{default}]".strip().replace("%", "%%")


def _plain(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(name: str, key: Key) -> str | None:
    if key.kind is bool:
        return None
    if typing.get_origin(key.kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(key.kind))) + "}"
    return _METAVARS.get(name) or {int: "N", float: "X", str: "TEXT"}[key.kind]
