"""Reads `calibration.json`: the threshold of each exit, as measured by `ee-tuning calibrate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ee_tuning.config.generation import Measure
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The content of the file, as far as decoding uses it."""

    thresholds: dict[int, float | None]
    """Exit layer -> confidence from which on a token may leave there; None where none is high enough."""
    measure: Measure
    """The measure of that confidence."""
    num_layers: int
    """Number of layers of the model that it was made for."""
    heads_digest: str | None
    """Digest of the exit heads that it was made for; see LoadedModel."""

    @property
    def used(self) -> dict[int, float]:
        """The exits that are asked."""
        return {layer: threshold for layer, threshold in self.thresholds.items() if threshold is not None}


def read_calibration(
    path: str | Path, exit_layers: tuple[int, ...], num_layers: int, heads_digest: str | None = None
) -> Calibration:
    """Reads the file. Raises InputError where it can not be read, is inconsistent, or was made for other exits, or for
    these before they were tuned.
    """
    try:
        tree = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"generation.calibration must name a file that ee-tuning calibrate wrote, got {path}: "
            f"{' '.join(str(error).split())}"
        ) from error
    calibration = _of_tree(tree, path)
    early = tuple(layer for layer in exit_layers if layer < num_layers)
    if (tuple(sorted(calibration.thresholds)), calibration.num_layers) != (early, num_layers):
        raise InputError(
            f"{path} was made for exits {', '.join(map(str, calibration.thresholds))} of {calibration.num_layers} layers, and "
            f"this model has {', '.join(map(str, early)) or 'none'} of {num_layers}; run ee-tuning calibrate for it"
        )
    if None not in (heads_digest, calibration.heads_digest) and heads_digest != calibration.heads_digest:
        raise InputError(
            f"{path} was made for other weights of these exits (sha256 {str(calibration.heads_digest)[:16]}…, and theirs is "
            f"{str(heads_digest)[:16]}…); run ee-tuning calibrate for them"
        )
    return calibration


def _of_tree(tree: Any, path: str | Path) -> Calibration:
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} must be of ee-tuning calibrate's format version {FORMAT_VERSION}, got {version!r}; calibrate again"
        )
    thresholds, measure, num_layers, digest = (
        tree.get(key) for key in ("thresholds", "measure", "num_layers", "heads_digest")
    )
    makes_sense = (
        isinstance(thresholds, dict)
        and all(str(layer).isdecimal() for layer in thresholds)
        and all(value is None or (type(value) in (int, float) and 0 <= value <= 1) for value in thresholds.values())
        and measure in get_args(Measure)
        and type(num_layers) is int
        and isinstance(digest, str | None)
    )
    if not makes_sense:
        raise InputError(
            f"{path} must hold thresholds (exit layer: 0..1, or null), a measure and num_layers; calibrate again"
        )
    return Calibration(
        thresholds={int(layer): value for layer, value in thresholds.items()},
        measure=measure,
        num_layers=num_layers,
        heads_digest=digest,
    )
