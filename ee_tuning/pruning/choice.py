"""The layers to leave out: the value of `--drop`, and the rules by which layers are chosen. Pure functions.

The first layer and the last one always stay: the first turns embeddings into states, and the last makes the final
head's input. Both arXiv 2403.17887 and 2403.03853 find them the costliest to lose.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from ee_tuning.errors import InputError

# l layers

Measure = Literal["angular", "block-influence", "perplexity", "deepest"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Layers = tuple[int, ...]
"""Layers (1-based, increasing) that are left out."""


@dataclass(frozen=True)
class Drop:
    """The value of `--drop`: a number of layers, or layers."""

    count: int
    layers: Layers | None = None
    """The layers; None where a measure chooses them."""


def read_drop(words: Sequence[str], num_layers: int) -> Drop:
    """Parses auto:4, or 21,22 or 21-24 or several of these. Raises InputError where a model of `num_layers` layers can
    not lose these layers.
    """
    parts = [part.strip() for word in words for part in word.split(",") if part.strip()]
    if len(parts) == 1 and parts[0].startswith("auto"):
        found = re.fullmatch(r"auto:([1-9]\d{0,5})", parts[0])
        if found is None:
            raise InputError(f"--drop must be auto:N or layers, got {parts[0]!r}; for example --drop auto:4")
        drop = Drop(int(found[1]))
    else:
        layers = tuple(layer for part in parts for layer in _range(part))
        if not layers:
            raise InputError("--drop must name at least one layer, got none; for example --drop auto:4")
        if len(set(layers)) < len(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise InputError(f"--drop must name each layer once, got {twice} twice; leave one of them out")
        drop = Drop(len(layers), tuple(sorted(layers)))
    _check(drop, num_layers)
    return drop


def _range(part: str) -> range:
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
    if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
        raise InputError(f"--drop takes auto:N, layers and ranges of layers, got {part!r}; for example --drop 21-24")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _check(drop: Drop, num_layers: int) -> None:
    for layer in drop.layers or ():
        if not 1 <= layer <= num_layers:
            raise InputError(f"--drop must name layers in 1..{num_layers} (the model's), got {layer}")
        if layer in (1, num_layers):
            raise InputError(
                f"--drop must leave the first layer and the last one, 1 and {num_layers}, without which no other is of use, "
                f"got {layer}; name layers in 2..{num_layers - 1}"
            )
    if drop.count > num_layers - 2:
        raise InputError(
            f"--drop must leave the first layer and the last one of the model's {num_layers}, so that at most "
            f"{max(num_layers - 2, 0)} can go, got {drop.count}; drop fewer"
        )


def blocks(num_layers: int, count: int) -> list[Layers]:
    """Returns every run of `count` layers that leaves the first layer and the last one, shallow to deep."""
    return [tuple(range(first, first + count)) for first in range(2, num_layers - count + 1)]


def deepest_block(num_layers: int, count: int) -> Layers:
    """Returns the deepest layers but the last one: the simple rule of arXiv 2403.17887."""
    return blocks(num_layers, count)[-1]


def most_similar_block(distances: Tensor, count: int) -> Layers:  # [l + 1, l + 1]
    """Returns the block whose input and output are nearest by angle (arXiv 2403.17887); `distances` is
    between the inputs of any two layers. Of equal ones the deepest is taken.
    """
    return min(reversed(blocks(len(distances) - 1, count)), key=lambda block: float(distances[block[0] - 1, block[-1]]))


def least_influential(influences: Sequence[float], count: int) -> Layers:
    """Returns the `count` layers of least block influence, neighbours or not (arXiv 2403.03853); `influences` is each
    layer's.
    """
    inner = range(len(influences) - 1, 1, -1)
    return tuple(sorted(sorted(inner, key=lambda layer: influences[layer - 1])[:count]))


def in_words(layers: Iterable[int]) -> str:
    """Returns 3, 7-9 for (3, 7, 8, 9)."""
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in _runs(tuple(layers)))


def _runs(layers: Layers) -> Iterator[Layers]:
    ends = [place for place, (one, other) in enumerate(pairwise(layers), 1) if other != one + 1]
    for first, last in pairwise([0, *ends, len(layers)] if layers else [0]):
        yield layers[first:last]
