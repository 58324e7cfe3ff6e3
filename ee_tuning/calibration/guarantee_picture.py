"""The picture of `ee-tuning calibrate --guarantee`: loss and savings of each threshold, and their certainty."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.calibration.guarantee import Proof
from ee_tuning.config.generation import Measure
from ee_tuning.pictures import MUTED, picture, shade


@dataclass(frozen=True, kw_only=True)
class PictureLabels:
    """Labels that describe the losses."""

    loss: str = "Tokens that differ from the full model's"
    of: str = "of a document, %"
    units: str = "documents"


def draw_guarantee(
    proofs: Mapping[Measure, Proof], chosen: Measure, delta: float, output: Path, words: PictureLabels = PictureLabels()
) -> None:
    """Draws the picture. Raises InputError where `output` can not be written."""
    first = next(iter(proofs.values()))
    title = f"{first.num_documents:,} {words.units}; points: the lowest thresholds that hold; dashed: the guarantee, and its level"
    with picture(output, columns=2, size=(11, 4.4), title=title) as (loss, doubt):
        for place, (measure, proof) in enumerate(proofs.items()):
            look = {"color": shade("viridis", place, len(proofs)), "linewidth": 2 if measure == chosen else 1}
            label = f"{measure}, " + ("none proven" if proof.threshold is None else f"down to {proof.threshold:.3f}")
            last = slice(max(proof.num_proven - 1, 0), proof.num_proven)  # empty where none is proven
            for axes, values in ((loss, 100 * proof.losses), (doubt, proof.p_values.clamp(min=1e-6))):
                axes.plot(proof.depths, values, label=label, **look)
                axes.plot(proof.depths[last], values[last], "o", color=look["color"])
        loss.axhline(100 * delta, color=MUTED, linewidth=1, linestyle="--")
        doubt.axhline(first.level, color=MUTED, linewidth=1, linestyle="--")
        loss.set(title=words.loss, xlabel="layers a token", ylabel=words.of)
        doubt.set(title="p-value of each threshold", xlabel="layers a token", yscale="log", ylim=(1e-6, 2))
        for axes in (loss, doubt):
            axes.invert_xaxis()
        loss.legend(frameon=False)
