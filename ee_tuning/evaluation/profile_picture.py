"""The picture of `ee-tuning profile`: the angle of each layer, and the distances between all of them."""

from pathlib import Path

from torch import Tensor

from ee_tuning.pictures import CURVE, PALE, picture


def draw_profile(distances: Tensor, exit_layers: tuple[int, ...], name: str, output: Path) -> None:
    """Draws `distances` [layers + 1, layers + 1] of a `Profile`. Raises InputError where `output` can not be
    written.
    """
    by_layer = distances.diagonal(1).tolist()
    title = f"{name}: what its layers do to a text's hidden states"
    with picture(output, columns=2, size=(11, 4.4), title=title) as (line, heat):
        for layer in exit_layers:
            line.axvline(layer, color=PALE, linewidth=4)
        line.plot(range(1, len(by_layer) + 1), by_layer, "-o", color=CURVE, markersize=4)
        line.set(
            title=f"Exits after {', '.join(map(str, exit_layers))}",
            xlabel="layer",
            ylabel="angular distance from input to output",
        )
        line.set_ylim(bottom=0)
        corner = len(by_layer) + 1.5
        extent = (0.5, corner, 0.5, corner)
        image = heat.imshow(distances.numpy(), cmap="viridis", origin="lower", extent=extent)
        heat.set(title="Between the inputs of two layers", xlabel="layer", ylabel="layer")
        heat.figure.colorbar(image, ax=heat)
