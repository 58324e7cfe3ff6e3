"""Exits of a model that loses layers: they keep their weights and move with the states that they read.

A layer that is left out passes its input on. An exit behind it then reads the output of the nearest layer below that
stays, and moves there, unless that layer already has an exit.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_heads import ExitHeadsReader, write_exit_heads
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.errors import InputError
from ee_tuning.export.export_source import ExportSource
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.tensor_blocks import tensor_blocks
from ee_tuning.storage.tensor_source import RenamedTensors


@dataclass(frozen=True)
class MovedExits:
    """New places of a model's exits."""

    layers: dict[int, int]
    """Exit layer of the whole model -> exit layer of the pruned one, increasing."""
    left_out: dict[int, str]
    """Exit layer of an exit that does not go along -> the reason."""

    def lines(self) -> list[str]:
        """Returns a line per exit, for the screen."""
        moved = [f"exit after layer {old}: after layer {new}" for old, new in self.layers.items()]
        return moved + [f"exit after layer {old}: left out, {reason}" for old, reason in self.left_out.items()]


def moved_exits(exits: ExitHeadsConfig, kept: Sequence[int]) -> MovedExits:
    """Returns where `exits` go in a model of the layers `kept`. Raises InputError where none can go along."""
    layers, left_out, taken = dict[int, int](), dict[int, str](), dict[int, int]()
    stays = {layer: layer in kept for layer in exits.exit_layers}
    # Exits behind layers that stay come first; of those with the same new place, the one nearest to the layer.
    for head in sorted(exits.heads, key=lambda head: (not stays[head.layer], head.layer)):
        new = nearest_below(kept, head.layer)
        if not stays[head.layer] and head.architecture == "mlp":
            left_out[head.layer] = "an mlp exit takes the place of its layer's MLP, and the layer is dropped"
        elif new in taken:
            left_out[head.layer] = f"its place, layer {new}, has the exit that was after layer {taken[new]}"
        else:
            layers[head.layer], taken[new] = new, head.layer
    if not layers:
        raise InputError(
            f"no exit of {exits.model_name} can go along: "
            + "; ".join(f"the one after layer {layer}, {reason}" for layer, reason in list(left_out.items())[:2])
            + "; drop other layers, or leave --exits out"
        )
    return MovedExits(dict(sorted(layers.items())), dict(sorted(left_out.items())))


def nearest_below(kept: Sequence[int], layer: int) -> int:
    """Returns the new number of the deepest layer of `kept` that is not above `layer`; 0 is the word embedding."""
    return sum(each <= layer for each in kept)


def write_moved_exits(
    artifact: ExitHeadsReader,
    moved: MovedExits,
    pruned: ExportSource,
    name: str,
    kept: Sequence[int],
    output: Path,
    topology: Topology,
    *,
    overwrite: bool,
) -> None:
    """Writes the exits of `artifact` that go along to `output`, bound to the model `pruned`, called `name`. All ranks
    call it.
    """
    exits = dataclasses.replace(
        moved_config(artifact.config, moved, kept),
        model_name=name,
        model_shape=model_shape(pruned.model),
        model_fingerprint=on_first_rank(topology, lambda: fingerprint(pruned.source, pruned.model)),
    )
    old_layers, origins = {str(new): old for old, new in moved.layers.items()}, {}
    for tensor in exits.tensor_shapes(pruned.model):
        _, layer, rest = tensor.split(".", 2)
        origins[tensor] = f"exits.{old_layers[layer]}.{rest}"
    tensors = RenamedTensors(artifact, origins)
    write_exit_heads(
        output, exits, pruned.model, lambda tensor: tensor_blocks(tensors, tensor), topology, overwrite=overwrite
    )


def moved_config(exits: ExitHeadsConfig, moved: MovedExits, kept: Sequence[int]) -> ExitHeadsConfig:
    """Returns the description of the exits that go along. Raises InputError where layers that a drafting head reads
    become one.
    """
    words = dict(zip(exits.exit_layers, exits.architecture, strict=True))
    return dataclasses.replace(
        exits,
        exit_layers=tuple(moved.layers.values()),
        architecture=tuple(words[old] for old in moved.layers),
        adapter_rank=exits.adapter_rank if "adapter" in [words[old] for old in moved.layers] else None,
        adds_linear=tuple(new for old, new in moved.layers.items() if old in exits.adds_linear),
        origins=exits.origins and {str(new): exits.origins[str(old)] for old, new in moved.layers.items()},
        draft=None if exits.draft is None else dataclasses.replace(exits.draft, aux_layers=_aux_layers(exits, kept)),
    )


def _aux_layers(exits: ExitHeadsConfig, kept: Sequence[int]) -> tuple[int, ...]:
    assert exits.draft is not None
    layers = tuple(nearest_below(kept, layer) for layer in exits.draft.aux_layers)
    if len(set(layers)) < len(layers):
        raise InputError(
            f"the drafting head reads the states of layers {', '.join(map(str, exits.draft.aux_layers))}, two of which "
            "would become one; drop other layers, or leave --exits out"
        )
    return layers
