"""Writes `calibration.json`. ee_tuning/sampling/calibration.py reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.config import Config
from ee_tuning.json_file import to_json
from ee_tuning.sampling.calibration import FORMAT_VERSION
from ee_tuning.storage.atomic_write import atomic_file


def write_calibration(
    output: Path, config: Config, num_layers: int, heads_digest: str | None, measured: Mapping[str, Any]
) -> None:
    """Writes `measured`, after fields that bind it to the model and its heads (LoadedModel.heads_digest).

    Raises InputError where `output` can not be written.
    """
    tree = {
        "format_version": FORMAT_VERSION,
        "model_name": model_folder(config.model.path).name,
        "num_layers": num_layers,
        "heads_digest": heads_digest,
        **measured,
    }
    with atomic_file(output) as temporary:
        temporary.write_text(as_json(tree), encoding="utf-8")


def as_json(tree: object) -> str:
    """Formats numbers with few digits."""
    return to_json(json.loads(to_json(tree), parse_float=lambda text: round(float(text), 8)), indent=1) + "\n"
