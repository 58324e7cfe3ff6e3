"""The picture of `ee-tuning calibrate`: agreement of each exit, and share of tokens it would take, by threshold."""

from pathlib import Path

from ee_tuning.pictures import MUTED, picture, shade


def draw_calibration(
    curves: dict[int, list[tuple[float, float, float]]],
    thresholds: dict[int, float | None],
    wanted: float,
    measure: str,
    output: Path,
) -> None:
    """Draws `curves`, from `calibrate.curve`, by exit. Raises InputError where `output` can not be written."""
    title = "Each exit by itself; dotted: the chosen thresholds, on tokens that no exit before took"
    with picture(output, columns=2, size=(11, 4.4), title=title) as (right, taken):
        for place, (layer, points) in enumerate(curves.items()):
            colour, threshold = shade("viridis", place, len(curves)), thresholds[layer]
            x, shares, agreements = zip(*points, strict=True)
            label = f"layer {layer}" + (", not used" if threshold is None else f", from {threshold:.3f}")
            right.plot(x, [100 * a for a in agreements], color=colour, label=label)
            taken.plot(x, [100 * s for s in shares], color=colour, label=label)
            if threshold is not None:
                for axes in (right, taken):
                    axes.axvline(threshold, color=colour, linewidth=1, linestyle=":")
        right.axhline(100 * wanted, color=MUTED, linewidth=1, linestyle="--")
        across = f"threshold ({measure})"
        right.set(title="Agreement with the full model", xlabel=across, ylabel="of the tokens above it, %")
        taken.set(title="Tokens above the threshold", xlabel=across, ylabel="of all tokens, %", ylim=(0, 100))
        taken.legend(frameon=False)
