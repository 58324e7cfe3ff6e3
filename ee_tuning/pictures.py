"""Pictures as PNG files, all with one look. They are drawn without a display."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ee_tuning.storage.atomic_write import atomic_file

BACKGROUND, INK, MUTED, CURVE, PALE = "#ffffff", "#1f2430", "#8a90a0", "#2f6fde", "#c9ced9"
_LABEL_HEIGHTS = (8, -15, 20, -27)
"""Label offsets in points: neighbours alternate, so that labels of similar values do not overlap."""
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": BACKGROUND,
}


@contextmanager
def picture(
    path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float], title: str = ""
) -> Iterator[list[Any]]:
    """Yields the axes of a figure of `size` inches, row by row, and writes it to `path` when the block ends.

    Raises InputError where the disk refuses.
    """
    import matplotlib  # imported here, so that processes that draw nothing do not load it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield list(axes.flat)
            if title:
                figure.suptitle(title)
            with atomic_file(path) as temporary:
                figure.savefig(temporary, dpi=110, format="png")
        finally:
            plt.close(figure)


def shade(colours: str, place: int, count: int) -> Any:
    """Returns the colour number `place` of `count` that lie apart in matplotlib's map `colours`."""
    import matplotlib

    lowest, highest = (0.25, 0.9) if colours == "YlGnBu" else (0.0, 0.85)
    return matplotlib.colormaps[colours](lowest + (highest - lowest) * place / max(count - 1, 1))


def label_point(axes: Any, text: str, point: tuple[float, float], place: int) -> None:
    """Writes `text` at the point number `place` of a curve."""
    axes.annotate(
        text,
        point,
        textcoords="offset points",
        xytext=(0, _LABEL_HEIGHTS[place % len(_LABEL_HEIGHTS)]),
        ha="center",
        fontsize=9,
    )


def draw_exit_shares(
    axes: Any, names: Sequence[str], layers: Sequence[int], shares: Sequence[Sequence[float]], num_layers: int
) -> None:
    """Draws a bar for each of `names`, divided by the layers after which tokens left. `shares` holds, for each layer,
    the share of each bar in %.
    """
    left = [0.0] * len(names)
    for place, (layer, own) in enumerate(zip(layers, shares, strict=True)):
        label = "the end" if layer == num_layers else f"layer {layer}"
        axes.barh(range(len(names)), own, left=left, color=shade("YlGnBu", place, len(layers)), label=label)
        left = [a + b for a, b in zip(left, own, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="share of tokens, %", xlim=(0, 100))
