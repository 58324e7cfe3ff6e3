"""`exit_config.json`: what an exit-heads artifact holds, which model it is bound to, how its heads began and were
tuned.
"""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ee_tuning.checkpoint.exit_names import exit_tensor_shapes
from ee_tuning.checkpoint.exit_vocab import VOCAB, read_token_ids
from ee_tuning.checkpoint.names import TensorShape
from ee_tuning.config import Architecture
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.model.config import STORED_DTYPES, ModelConfig
from ee_tuning.model.exit_spec import ExitSpec

CONFIG = "exit_config.json"
FORMAT_VERSION = 4
"""Version 1 knew one architecture for all exits, and no `layer` and `adapter` heads; version 2 no linear maps and no
fits; version 3 no shortlists. All are read too.
"""
_REMEDY = "fetch or convert the exits again"


@dataclass(frozen=True, kw_only=True)
class ExitHeadsConfig:
    """What an artifact holds: `exit_config.json`."""

    format_version: int = FORMAT_VERSION
    exit_layers: tuple[int, ...]
    """Backbone layers (1-based) that are followed by an exit head."""
    architecture: tuple[Architecture, ...]
    """Each exit's head; in the file one word where all are alike."""
    adapter_rank: int | None = None
    """Inner width of the `adapter` heads; None where there are none."""
    output: Literal["untied", "tied"]
    """tied: the backbone's output matrix, of which nothing is stored."""
    dtype: str
    """What the tensors are stored in: the backbone's own."""
    model_name: str
    """The backbone's name, for people."""
    model_shape: dict[str, Any]
    """The backbone's shape, `fingerprint.model_shape`."""
    model_fingerprint: str
    """What binds the exits to their backbone."""
    init: Literal["copy", "random", "fitted", "ee_llm"]
    """How the heads began; fitted: copied, then fitted by least squares; ee_llm: as they stood, tuned, in an EE-LLM
    checkpoint.
    """
    seed: int | None = None
    """The seed of random initialization."""
    tuned: dict[str, Any] | None = None
    """How they were tuned: steps, tokens, …; None where they were not, or not together."""
    origins: dict[str, Any] | None = None
    """{"init", "seed", "tuned"} of each exit layer and, where it has one, "fitted", where exits that began or were
    tuned apart have been put together.
    """
    adds_linear: tuple[int, ...] = ()
    """Exits with a linear map before the tied output matrix, which a fit gave them: ExitSpec.adds_linear."""
    fitted: dict[str, Any] | None = None
    """What a fit was made from: {"tokens", "ridge"}; None where there was none."""
    output_vocab: dict[str, Any] | None = None
    """What a shortlist was made from: {"size", "tokens", "share"}, the tokens of a text that were counted and the share
    of them that is listed; None where the exits say the whole vocabulary.
    """
    token_ids: tuple[int, ...] = ()
    """The shortlist, increasing: it lies in a file of its own, `exit_vocab.json`."""

    @property
    def ties_output(self) -> bool:
        """Whether the exits use the backbone's output matrix."""
        return self.output == "tied"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

    @property
    def heads(self) -> tuple[ExitSpec, ...]:
        """Each exit by itself."""
        return tuple(
            ExitSpec(
                layer=layer,
                architecture=architecture,
                ties_output=self.ties_output,
                adapter_rank=(self.adapter_rank or 0) if architecture == "adapter" else 0,
                adds_linear=layer in self.adds_linear,
                output_vocab=len(self.token_ids),
            )
            for layer, architecture in zip(self.exit_layers, self.architecture, strict=True)
        )

    def tensor_shapes(self, config: ModelConfig) -> dict[str, TensorShape]:
        """Every tensor of the artifact and its whole shape, in the order that they are stored in."""
        return exit_tensor_shapes(self.heads, config)


def exit_config_tree(exits: ExitHeadsConfig) -> dict[str, Any]:
    """What `exit_config.json` says."""
    words = exits.architecture
    tree = {**dataclasses.asdict(exits), "architecture": words[0] if len(set(words)) == 1 else list(words)}
    return {key: value for key, value in tree.items() if key != "token_ids"}


def read_exit_config(folder: Path) -> ExitHeadsConfig:
    """`exit_config.json`, strictly, and the shortlist where there is one. Raises InputError on unknown or missing keys,
    wrong values, or another format version.
    """
    path = folder / CONFIG
    try:
        tree = read_json(path)
        version = tree["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise InputError(
                f"{path}: format_version must be at most {FORMAT_VERSION}, got {version}; use the ee_tuning that wrote it"
            )
        exits = _from_json(tree)
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}; {_REMEDY}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not describe exit heads: {error!r}; {_REMEDY}") from error
    if exits.output_vocab is None:
        return exits
    ids = read_token_ids(folder, exits.output_vocab["size"], exits.model_shape.get("vocab_size"))
    return dataclasses.replace(exits, token_ids=ids)


def _from_json(tree: dict[str, Any]) -> ExitHeadsConfig:
    layers, words = tuple(tree["exit_layers"]), tree["architecture"]
    if "token_ids" in tree:
        raise ValueError(f"token_ids belong into {VOCAB}")
    exits = ExitHeadsConfig(
        **{
            **tree,
            "format_version": FORMAT_VERSION,
            "exit_layers": layers,
            "architecture": (words,) * len(layers) if isinstance(words, str) else tuple(words),
            "adds_linear": tuple(tree.get("adds_linear", ())),
        }
    )
    if (
        not layers
        or not all(type(layer) is int and layer > 0 for layer in layers)
        or list(layers) != sorted(set(layers))
    ):
        raise ValueError(f"exit_layers must be increasing layer numbers, got {layers}")
    hints = typing.get_type_hints(ExitHeadsConfig)
    if len(exits.architecture) != len(layers) or not set(exits.architecture) <= set(typing.get_args(Architecture)):
        raise ValueError(
            f"architecture must be one of {', '.join(typing.get_args(Architecture))}, or one for each exit, got {words!r}"
        )
    rank = exits.adapter_rank
    if (rank is None) == ("adapter" in exits.architecture) or not (rank is None or (type(rank) is int and rank > 0)):
        raise ValueError(f"adapter_rank must be the inner width of the adapter heads, got {rank!r}")
    for key, choices in (
        ("output", typing.get_args(hints["output"])),
        ("init", typing.get_args(hints["init"])),
        ("dtype", STORED_DTYPES),
    ):
        if tree[key] not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {tree[key]!r}")
    if not set(exits.adds_linear) <= set(layers) or (exits.adds_linear and not exits.ties_output):
        raise ValueError(f"adds_linear must name exits whose output is tied, got {list(exits.adds_linear)}")
    for key, kinds in (
        ("model_name", str),
        ("model_fingerprint", str),
        ("model_shape", dict),
        ("tuned", dict | None),
        ("seed", int | None),
        ("fitted", dict | None),
        ("output_vocab", dict | None),
    ):
        if not isinstance(getattr(exits, key), kinds):
            raise ValueError(f"{key} has the value {getattr(exits, key)!r}, which is of a wrong type")
    listed = exits.output_vocab
    if listed is not None and (exits.ties_output or type(listed.get("size")) is not int or listed["size"] < 1):
        raise ValueError(
            f"output_vocab must tell the size of a shortlist, of exits whose output is untied, got {listed!r}"
        )
    _check_origins(tree.get("origins"), layers)
    return exits


def _check_origins(origins: Any, layers: tuple[int, ...]) -> None:
    if origins is not None and not (
        isinstance(origins, dict)
        and sorted(origins) == sorted(map(str, layers))
        and all(
            isinstance(origin, dict) and set(origin) - {"fitted"} == {"init", "seed", "tuned"}
            for origin in origins.values()
        )
    ):
        raise ValueError(f"origins must tell init, seed and tuned of the exits {layers}, got {origins!r}")
