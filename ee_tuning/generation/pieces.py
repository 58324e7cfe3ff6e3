"""How decoding cuts the network: a segment ends at an exit, and again where a pipeline stage ends."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive layers on one stage without an exit in between."""

    first_layer: int
    last_layer: int
    stage: int
    exit_layer: int | None
    """The exit at its end; the number of layers at the very end, for the final head; None where only a stage ends."""


def cut_pieces(stages: list[tuple[int, int]], exit_layers: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of a model whose stage p holds layers stages[p], first and last, 1-based."""
    num_layers = stages[-1][1]
    pieces = []
    for stage, (first, last) in enumerate(stages):
        ends = sorted({layer for layer in exit_layers if first <= layer < last} | {last})
        for start, end in zip([first, *(e + 1 for e in ends[:-1])], ends, strict=True):
            named = end in exit_layers or end == num_layers
            pieces.append(Piece(first_layer=start, last_layer=end, stage=stage, exit_layer=end if named else None))
    return tuple(pieces)
