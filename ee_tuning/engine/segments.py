"""Segments of the network for decoding: a segment ends at each exit, and at the end of each pipeline stage."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive layers of one stage; none where `last_layer` is before `first_layer`."""

    first_layer: int
    last_layer: int
    stage: int
    exit_layer: int | None
    """The exit at its end; None where the model's own head follows, or no head."""
    is_last: bool
    """Whether the model's own head follows."""
    is_read: bool = False
    """Whether a drafting head reads the states behind it."""


def cut_segments(
    stages: list[tuple[int, int]], exit_layers: tuple[int, ...], read_layers: tuple[int, ...] = ()
) -> tuple[Segment, ...]:
    """Returns the segments of a model whose stage p has layers stages[p], first and last, 1-based. A drafting head
    reads the states behind `read_layers`; 0 is the embedding.

    An exit behind the last layer is an exit of its own: the model's head then follows a segment without layers.
    """
    num_layers, segments = stages[-1][1], list[Segment]()
    for stage, (first, last) in enumerate(stages):
        start = first
        for end in sorted({layer for layer in (*exit_layers, *read_layers) if first <= layer < last} | {last}):
            exit_layer = end if end in exit_layers and start <= end else None
            is_last = end == num_layers and exit_layer is None and stage == len(stages) - 1
            segments.append(
                Segment(
                    first_layer=start,
                    last_layer=end,
                    stage=stage,
                    exit_layer=exit_layer,
                    is_last=is_last,
                    is_read=end in read_layers,
                )
            )
            start = end + 1
    if not segments[-1].is_last:
        segments.append(
            Segment(
                first_layer=num_layers + 1, last_layer=num_layers, stage=len(stages) - 1, exit_layer=None, is_last=True
            )
        )
    return tuple(segments)
