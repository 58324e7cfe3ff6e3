"""Exports one exit as a plain Hugging Face folder: a shallow model of the backbone's family, which any engine runs.

It drafts for the whole model or serves on its own, without code of this project.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from ee_tuning.artifact.exit_config import exit_config_tree
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.export.draft_card import draft_card, pruned_card
from ee_tuning.export.export_source import check_target, open_for_export
from ee_tuning.export.folded_output import PlainExitTensors
from ee_tuning.export.folder_writer import MARKS
from ee_tuning.export.plain_exit import plain_exit
from ee_tuning.export.plain_folder import plain_description, write_plain_folder
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

PlainFormat = Literal["draft", "pruned"]
"""The files are the same; the card describes their purpose."""


def export_draft(
    config: Config,
    output: Path,
    exit_layer: int,
    topology: Topology | None = None,
    *,
    kind: PlainFormat = "draft",
    overwrite: bool = False,
    special: Mapping[str, int] = MappingProxyType({}),
    constant: Tensor | None = None,
) -> None:
    """Writes the exit of exits.path after `exit_layer`, with the layers of model.path below it, to `output`.

    All ranks call it and share the files. Tensors keep their dtypes. `special` holds token ids for config.json that the
    model's own lacks. `constant` is the u of `folded_output.py`, by which a bias is folded approximately. Raises
    InputError where the exit is no plain model, model and exits do not belong together, or `output` can not be written;
    nothing is left behind then.
    """
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
    on_first_rank(topology, lambda: check_target(config, output, overwrite, MARKS))
    with open_for_export(config, topology) as model:
        assert model.artifact is not None
        plain = plain_exit(chosen_exit(model.artifact.config.heads, exit_layer, str(config.exits.path)), model.model)
        tensors = PlainExitTensors(plain, model.source, model.artifact, constant)
        num_layers, depth = model.model.num_layers, plain.head.layer
        layers = [*range(1, depth + 1), *[num_layers] * (plain.config.num_layers - depth)]
        described = plain_description(model, plain.config, layers, special)
        tree = exit_config_tree(model.artifact.config)
        make_card = partial(draft_card, merging=model.merging) if kind == "draft" else pruned_card
        card = make_card(model.name, plain, tree, num_layers, is_nearly=constant is not None)
        write_plain_folder(model, tensors, plain.config, described, card, output, topology, tokenizer)


def chosen_exit(heads: tuple[ExitSpec, ...], exit_layer: int, artifact: str) -> ExitSpec:
    """Returns the exit after `exit_layer`. Raises InputError where the artifact has none there."""
    for head in heads:
        if head.layer == exit_layer:
            return head
    raise InputError(
        f"--exit must be a layer that an exit of {artifact} follows, got {exit_layer}; it has "
        f"{', '.join(str(head.layer) for head in heads)}"
    )
