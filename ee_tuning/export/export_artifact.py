"""Selects exits of an artifact, merges two artifacts of one model, and adds new exits to tuned ones."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_tuning.artifact.convert import described_heads
from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_heads import ExitHeadsReader, check_bound_to, write_exit_heads
from ee_tuning.artifact.exit_init import InitialExits
from ee_tuning.checkpoint.fingerprint import config_of_shape, fingerprint
from ee_tuning.checkpoint.formats import check_model, open_model
from ee_tuning.config import Architecture, Config
from ee_tuning.errors import InputError
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.tensor_blocks import tensor_blocks


@dataclass(frozen=True)
class _ExitOrigin:
    """Exits from one source."""

    source: ExitHeadsReader | InitialExits
    exits: ExitHeadsConfig
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExitChoice:
    """The exits of the new artifact."""

    only: tuple[int, ...] = ()
    """Exits of exits.path to keep; all others are left out."""
    drop: tuple[int, ...] = ()
    """Exits of exits.path to leave out; all others are kept."""
    merge: Path | None = None
    """An artifact whose exits are added."""
    add: tuple[int, ...] = ()
    """Layers after which new exits are added, initialized from the model."""
    architecture: tuple[Architecture, ...] = ()
    """Architectures of the new exits, one for all or one each. The default is that of the exits of exits.path, if it is
    one.
    """
    adapter_rank: int | None = None
    """Rank of new adapters. An artifact has one rank; the default is that of existing adapters, or else
    exits.adapter_rank.
    """


def export_artifact(config: Config, output: Path, choice: ExitChoice, *, overwrite: bool = False) -> ExitHeadsConfig:
    """Writes the artifact that `choice` makes of exits.path and, for new exits, of the model. Returns its config.

    Tensors are copied byte for byte, one at a time. Raises InputError where a layer is missing or occurs twice, the
    artifacts do not belong together, or `output` can not be written; nothing is left behind then.
    """
    if config.exits.path is None:
        raise InputError("export needs the exits to begin with, got none; give --exits FOLDER")
    check_apart(output, (config.exits.path, choice.merge, config.model.path))
    with ExitStack() as stack:
        base = stack.enter_context(ExitHeadsReader(Path(config.exits.path), verifies=config.exits.verify))
        model = config_of_shape(base.config.model_shape, base.folder)
        base.check_complete(model)
        parts = [_ExitOrigin(base, base.config, _kept(base, choice))]
        if choice.merge is not None:
            other = stack.enter_context(ExitHeadsReader(choice.merge, verifies=config.exits.verify))
            _check_belong_together(base, other)
            other.check_complete(model)
            parts.append(_ExitOrigin(other, other.config, other.config.exit_layers))
        if choice.add:
            parts.append(_new_exits(config, base, parts, choice, stack))
        exits = _joined(parts)
        write_exit_heads(output, exits, model, partial(_blocks, parts), overwrite=overwrite)
    return exits


def origin_of(exits: ExitHeadsConfig, layer: int) -> dict[str, Any]:
    """Returns how one exit was initialized and tuned: {"init", "seed", "tuned"} and possibly "fitted"."""
    if exits.origins is None:
        fitted = {} if exits.fitted is None else {"fitted": exits.fitted}
        return {"init": exits.init, "seed": exits.seed, "tuned": exits.tuned, **fitted}
    own = exits.origins[str(layer)]
    return {**own, "tuned": exits.tuned or own["tuned"]}


def _kept(base: ExitHeadsReader, choice: ExitChoice) -> tuple[int, ...]:
    held = base.config.exit_layers
    if choice.only and choice.drop:
        raise InputError("--only and --drop exclude each other; give one of them")
    for flag, layers in (("--only", choice.only), ("--drop", choice.drop)):
        for layer in layers:
            if layer not in held:
                raise InputError(
                    f"{flag} must name exits of {base.folder}, which holds {', '.join(map(str, held))}, got {layer}"
                )
    return tuple(layer for layer in held if (layer in choice.only if choice.only else layer not in choice.drop))


def _check_belong_together(base: ExitHeadsReader, other: ExitHeadsReader) -> None:
    check_bound_to(other, base.config.model_fingerprint)
    for key in ("output", "dtype", "model_shape", "adapter_rank"):
        ours, theirs = getattr(base.config, key), getattr(other.config, key)
        if ours != theirs and not (key == "adapter_rank" and None in (ours, theirs)):
            raise InputError(
                f"artifacts that are merged must have the same {key}: {base.folder} has {ours}, {other.folder} has {theirs}; "
                "convert and tune one of them as the other"
            )
    if base.config.token_ids != other.config.token_ids:
        sizes = [
            f"{len(each.config.token_ids):,} tokens" if each.config.token_ids else "none" for each in (base, other)
        ]
        raise InputError(
            f"artifacts that are merged must have the same shortlist: {base.folder} has {sizes[0]}, {other.folder} has "
            f"{sizes[1]}, or others; convert one of them on the other's texts with the same --output-vocab"
        )


def _new_exits(
    config: Config, base: ExitHeadsReader, parts: list[_ExitOrigin], choice: ExitChoice, stack: ExitStack
) -> _ExitOrigin:
    """Creates new exits like those of `base`, beside those of `parts`."""
    if not config.model.path:
        raise InputError("--add initializes exits from the model they are for, got none; give --model FOLDER")
    if config.exits.init == "fitted":
        raise InputError(
            "--add takes --init copy or random, got fitted, which reads texts; convert those by --init fitted --data …, and "
            "give --merge that folder"
        )
    layers = tuple(sorted(choice.add))
    source, model, _ = open_model(config.model)
    stack.enter_context(source)
    model.check_exit_layers(layers)
    kinds = choice.architecture or tuple(dict.fromkeys(base.config.architecture))
    if not choice.architecture and len(kinds) > 1:
        raise InputError(
            f"--add needs the architecture of the new exits, for those of {base.folder} differ; "
            f"for example --architecture {kinds[0]}"
        )
    section = dataclasses.replace(
        config.exits,
        architecture=kinds,
        output=base.config.output,
        adapter_rank=_adapter_rank(config, parts, choice) if "adapter" in kinds else config.exits.adapter_rank,
    )
    heads = described_heads(section, layers, model)
    check_model(source, model, None, verifies=config.exits.verify)
    check_bound_to(base, fingerprint(source, model))
    exits = dataclasses.replace(base.config, exit_layers=layers, tuned=None, origins=None, fitted=None, **heads)
    return _ExitOrigin(InitialExits(exits, source, model), exits, layers)


def _adapter_rank(config: Config, parts: list[_ExitOrigin], choice: ExitChoice) -> int:
    """Returns the rank of new adapters. Raises InputError where it must differ from that of existing adapters."""
    held = max(
        (head.adapter_rank for part in parts for head in part.exits.heads if head.layer in part.layers), default=0
    )
    if held and choice.adapter_rank not in (None, held):
        raise InputError(
            f"--adapter-rank must be {held}, which the adapters beside the new exits have, got {choice.adapter_rank}; leave "
            "it out, or leave those out with --drop"
        )
    return held or choice.adapter_rank or config.exits.adapter_rank


def _joined(parts: list[_ExitOrigin]) -> ExitHeadsConfig:
    layers = [layer for part in parts for layer in part.layers]
    if not layers:
        raise InputError(
            "an artifact must hold at least one exit, and none would be left; keep one, or give --merge or --add"
        )
    for layer in layers:
        if layers.count(layer) > 1:
            raise InputError(
                f"each layer can have one exit, and the one after layer {layer} comes from two places; "
                f"leave one out, for example with --drop {layer}"
            )
    origins = {layer: origin_of(part.exits, layer) for part in parts for layer in part.layers}
    first = next(iter(origins.values()))
    heads = sorted(
        (head for part in parts for head in part.exits.heads if head.layer in part.layers), key=lambda head: head.layer
    )
    base = dataclasses.replace(
        parts[0].exits,
        exit_layers=tuple(head.layer for head in heads),
        architecture=tuple(head.architecture for head in heads),
        adapter_rank=max(head.adapter_rank for head in heads) or None,
        adds_linear=tuple(head.layer for head in heads if head.adds_linear),
        init=first["init"],
        seed=first["seed"],
        fitted=first.get("fitted"),
    )
    if all(origin == first for origin in origins.values()):
        return dataclasses.replace(base, tuned=first["tuned"], origins=None)
    return dataclasses.replace(
        base, tuned=None, fitted=None, origins={str(layer): origins[layer] for layer in sorted(layers)}
    )


def _blocks(parts: list[_ExitOrigin], name: str) -> Iterator[Tensor]:
    layer = int(name.split(".")[1])
    source = next(part.source for part in parts if layer in part.layers)
    return source.blocks(name) if isinstance(source, InitialExits) else tensor_blocks(source, name)
