"""Exit heads for the tests' random models, and models loaded with them."""

from collections.abc import Sequence
from pathlib import Path

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.artifact.load import LoadedModel, load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.parallel.topology import init_parallel


def write_exits(model: Path, folder: Path, listed: Sequence[int] = (), **exits: object) -> Path:
    """An artifact for `model` from keys of the `exits` section; by default `mlp` heads after layers 2 and 4, drawn at
    random. They say no more than the tokens `listed`, where there are any.
    """
    keys = {"exit_layers": [2, 4], "architecture": "mlp", "init": "random", **exits}
    config = load_config(None, {"model.path": str(model), **{f"exits.{key}": value for key, value in keys.items()}})
    tokens = ListedTokens(token_ids=tuple(listed), num_tokens=len(listed), num_listed=len(listed))
    write_initial_exits(
        config, folder, init_parallel(ParallelSection()), list_tokens=(lambda topology: tokens) if listed else None
    )
    return folder


def loaded_with(model: Path, exits: Path | None = None, dtype: str | None = None) -> LoadedModel:
    """The model with its exits in this process alone, ready to decode."""
    keys = {"model.path": str(model), "exits.path": str(exits) if exits else None, "model.dtype": dtype}
    return load_for_generation(load_config(None, keys), init_parallel(ParallelSection()))
