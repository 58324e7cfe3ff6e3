"""`exit_config.json`: the content of an exit-heads artifact, its model, and how its heads were initialized and
tuned.
"""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ee_tuning.artifact.exit_names import exit_tensor_shapes
from ee_tuning.artifact.exit_vocab import VOCAB, read_token_ids
from ee_tuning.config import Architecture, TeacherPlan, TuningSection
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.model.draft_spec import DraftSpec, draft_tree, read_draft_tree
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import STORED_DTYPES, ModelConfig
from ee_tuning.storage.tensor_slice import TensorShape

CONFIG = "exit_config.json"
FORMAT_VERSION = 5
"""Version 1 had one architecture for all exits, without `layer` and `adapter` heads; version 2 had no linear maps and
no fits; version 3 had no shortlists; version 4 had no `eagle3` heads. All of them can be read.
"""
_REMEDY = "fetch or convert the exits again"


@dataclass(frozen=True, kw_only=True)
class ExitHeadsConfig:
    """The content of `exit_config.json`."""

    format_version: int = FORMAT_VERSION
    exit_layers: tuple[int, ...]
    """Backbone layers (1-based) followed by an exit head."""
    architecture: tuple[Architecture, ...]
    """Architecture of each exit. The file holds one word where all are alike."""
    adapter_rank: int | None = None
    """Inner width of the `adapter` heads; None without any."""
    output: Literal["untied", "tied"]
    """tied: the exits use the backbone's output matrix, and none is stored."""
    dtype: str
    """dtype of the tensors: the backbone's own."""
    model_name: str
    """Name of the backbone, for messages."""
    model_shape: dict[str, Any]
    """Shape of the backbone, from `fingerprint.model_shape`."""
    model_fingerprint: str
    """Fingerprint of the backbone that the exits belong to."""
    init: Literal["copy", "random", "fitted", "ee_llm", "published"]
    """Initialization of the heads. fitted: copied, then fitted by least squares; ee_llm: taken from an EE-LLM
    checkpoint, tuned; published: taken from a published head of EAGLE-3.
    """
    seed: int | None = None
    """Seed of random initialization."""
    tuned: dict[str, Any] | None = None
    """Facts about the tuning: steps, tokens, …; None if the exits were not tuned, or not together."""
    origins: dict[str, Any] | None = None
    """{"init", "seed", "tuned"} and possibly "fitted" of each exit layer, where exits of different origin were
    merged.
    """
    adds_linear: tuple[int, ...] = ()
    """Exits with a linear map before the tied output matrix, which a fit added: ExitSpec.adds_linear."""
    fitted: dict[str, Any] | None = None
    """Facts about the fit: {"tokens", "ridge"}; None without a fit."""
    output_vocab: dict[str, Any] | None = None
    """Facts about the shortlist: {"size", "tokens", "share"}, that is, its size, the tokens counted in a text, and the
    share of them that is listed; and {"widened_from"}, its size before, where it was made longer. None where the exits
    cover the whole vocabulary.
    """
    token_ids: tuple[int, ...] = ()
    """The shortlist, increasing. Stored in a file of its own, `exit_vocab.json`."""
    draft: DraftSpec | None = None
    """Description of the `eagle3` head, or None."""

    @property
    def ties_output(self) -> bool:
        """Whether the exits use the backbone's output matrix."""
        return self.output == "tied"

    def teacher_plan(self, tuning: TuningSection) -> TeacherPlan | None:
        """Returns the final head's part in tuning these exits, or None where they need no teacher."""
        return tuning.teacher_plan(ties_output=self.ties_output, drafts=self.draft is not None)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as a torch.dtype."""
        return getattr(torch, self.dtype)

    @property
    def heads(self) -> tuple[ExitSpec, ...]:
        """Specification of each exit."""
        return tuple(
            ExitSpec(
                layer=layer,
                architecture=architecture,
                ties_output=self.ties_output,
                adapter_rank=(self.adapter_rank or 0) if architecture == "adapter" else 0,
                adds_linear=layer in self.adds_linear,
                output_vocab=len(self.token_ids),
                draft=self.draft,
            )
            for layer, architecture in zip(self.exit_layers, self.architecture, strict=True)
        )

    def tensor_shapes(self, config: ModelConfig) -> dict[str, TensorShape]:
        """Returns every tensor of the artifact and its whole shape, in the order of storage."""
        return exit_tensor_shapes(self.heads, config)


def exit_config_tree(exits: ExitHeadsConfig) -> dict[str, Any]:
    """Returns the content of `exit_config.json`."""
    words = exits.architecture
    tree = {**dataclasses.asdict(exits), "architecture": words[0] if len(set(words)) == 1 else list(words)}
    tree["draft"] = None if exits.draft is None else draft_tree(exits.draft)
    return {key: value for key, value in tree.items() if key != "token_ids"}


def read_exit_config(folder: Path) -> ExitHeadsConfig:
    """Reads `exit_config.json` and the shortlist, if any.

    Raises InputError on unknown or missing keys, wrong values, or another format version.
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
            "draft": None if tree.get("draft") is None else read_draft_tree(tree["draft"]),
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
    if (exits.draft is not None) != ("eagle3" in exits.architecture) or (exits.draft and len(layers) > 1):
        raise ValueError(
            "draft must describe the head of an artifact that holds one of architecture eagle3 and no other"
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
