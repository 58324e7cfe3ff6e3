"""The picture of `ee-tuning profile`: the angle of each layer, and the distances between all of them."""

from pathlib import Path

from torch import Tensor

from ee_tuning.storage.atomic_write import atomic_file

LINE, EXIT = "#2f6fde", "#c9ced9"


def draw_profile(distances: Tensor, exit_layers: tuple[int, ...], name: str, output: Path) -> None:
    """Draws `distances` [layers + 1, layers + 1] of a `Profile`. Raises InputError where `output` can not be
    written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    distances_by_layer = distances.diagonal(1).tolist()
    figure, (line, heat) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for layer in exit_layers:
        line.axvline(layer, color=EXIT, linewidth=4)
    line.plot(range(1, len(distances_by_layer) + 1), distances_by_layer, "-o", color=LINE, markersize=4)
    line.set(
        title=f"Exits after {', '.join(map(str, exit_layers))}",
        xlabel="layer",
        ylabel="angular distance from input to output",
    )
    line.set_ylim(bottom=0)
    image = heat.imshow(
        distances.numpy(),
        cmap="viridis",
        origin="lower",
        extent=(0.5, len(distances_by_layer) + 1.5, 0.5, len(distances_by_layer) + 1.5),
    )
    heat.set(title="Between the inputs of two layers", xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=heat)
    figure.suptitle(f"{name}: what its layers do to a text's hidden states")
    with atomic_file(output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
