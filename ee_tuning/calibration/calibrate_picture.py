"""The picture of `ee-tuning calibrate`: agreement of each exit, and share of tokens it would take, by threshold."""

from pathlib import Path

from ee_tuning.storage.atomic_write import atomic_file


def draw_calibration(
    curves: dict[int, list[tuple[float, float, float]]],
    thresholds: dict[int, float | None],
    wanted: float,
    measure: str,
    output: Path,
) -> None:
    """Draws `curves`, from `calibrate.curve`, by exit. Raises InputError where `output` can not be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (right, taken) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    shades = matplotlib.colormaps["viridis"]
    for i, (layer, points) in enumerate(curves.items()):
        colour, threshold = shades(0.85 * i / max(len(curves) - 1, 1)), thresholds[layer]
        x, shares, agreements = zip(*points, strict=True)
        label = f"layer {layer}" + (", not used" if threshold is None else f", from {threshold:.3f}")
        right.plot(x, [100 * a for a in agreements], color=colour, label=label)
        taken.plot(x, [100 * s for s in shares], color=colour, label=label)
        for axes in (right, taken):
            if threshold is not None:
                axes.axvline(threshold, color=colour, linewidth=1, linestyle=":")
    right.axhline(100 * wanted, color="#8a90a0", linewidth=1, linestyle="--")
    right.set(
        title="Agreement with the full model", xlabel=f"threshold ({measure})", ylabel="of the tokens above it, %"
    )
    taken.set(
        title="Tokens above the threshold", xlabel=f"threshold ({measure})", ylabel="of all tokens, %", ylim=(0, 100)
    )
    taken.legend(frameon=False)
    figure.suptitle("Each exit by itself; dotted: the chosen thresholds, on tokens that no exit before took")
    with atomic_file(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
