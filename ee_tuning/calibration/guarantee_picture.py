"""The picture of `ee-tuning calibrate --guarantee`: loss and savings of each threshold, and their certainty."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.calibration.guarantee import Proof
from ee_tuning.config.generation import Measure
from ee_tuning.storage.atomic_write import atomic_file


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, doubt) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    shades = matplotlib.colormaps["viridis"]
    for i, (measure, proof) in enumerate(proofs.items()):
        colour, at = shades(0.85 * i / max(len(proofs) - 1, 1)), proof.num_proven - 1
        label = f"{measure}, " + ("none proven" if proof.threshold is None else f"down to {proof.threshold:.3f}")
        loss.plot(proof.depths, 100 * proof.losses, color=colour, linewidth=2 if measure == chosen else 1, label=label)
        doubt.plot(
            proof.depths,
            proof.p_values.clamp(min=1e-6),
            color=colour,
            linewidth=2 if measure == chosen else 1,
            label=label,
        )
        if at >= 0:
            loss.plot(proof.depths[at], 100 * proof.losses[at], "o", color=colour)
            doubt.plot(proof.depths[at], proof.p_values[at].clamp(min=1e-6), "o", color=colour)
    first = next(iter(proofs.values()))
    loss.axhline(100 * delta, color="#8a90a0", linewidth=1, linestyle="--")
    doubt.axhline(first.level, color="#8a90a0", linewidth=1, linestyle="--")
    loss.set(title=words.loss, xlabel="layers a token", ylabel=words.of)
    doubt.set(title="p-value of each threshold", xlabel="layers a token", yscale="log", ylim=(1e-6, 2))
    for axes in (loss, doubt):
        axes.invert_xaxis()
    loss.legend(frameon=False)
    figure.suptitle(
        f"{first.num_documents:,} {words.units}; points: the lowest thresholds that hold; dashed: the guarantee, and its level"
    )
    with atomic_file(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
