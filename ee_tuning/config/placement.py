"""Automatic placement of a given number of exits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ee_tuning.errors import InputError


@dataclass(frozen=True)
class AutoLayers:
    """`auto:8`: eight exits, evenly in depth. `auto:8:profile`: evenly by how far the hidden states turn from layer to
    layer.
    """

    num_exits: int
    by_profile: bool = False

    @classmethod
    def read(cls, text: str) -> "AutoLayers | None":
        """Parses `auto:N`. Returns None where `text` does not begin with `auto`. Raises InputError where it does, but
        is invalid.
        """
        if not text.startswith("auto"):
            return None
        found = re.fullmatch(r"auto:([1-9]\d{0,3})(:profile)?", text)
        if found is None:
            raise InputError(
                f"exits.exit_layers must be layer numbers, auto:N or auto:N:profile, got {text!r}; for example auto:8"
            )
        return cls(int(found[1]), bool(found[2]))

    def __str__(self) -> str:
        return f"auto:{self.num_exits}" + ":profile" * self.by_profile


def evenly_along(path: Sequence[float], num_exits: int) -> tuple[int, ...]:
    """Returns `num_exits` layers that cut the path through all layers into parts of about equal length.

    path[l - 1] is the length up to layer l's output. The last layer gets no exit, since it would save nothing, unless
    every layer gets one. Raises InputError where there are too few layers.
    """
    num_layers = len(path)
    if num_exits > num_layers:
        raise InputError(
            f"exits.exit_layers must ask for at most {num_layers} exits, one per layer of the model, got {num_exits}"
        )
    chosen: list[int] = []
    for index in range(1, num_exits + 1):
        wanted = path[-1] * index / (num_exits + 1)
        still_to_come = num_exits - index
        candidates = range(chosen[-1] + 1 if chosen else 1, num_layers - still_to_come + (num_exits == num_layers))
        chosen.append(min(candidates, key=lambda layer: (abs(path[layer - 1] - wanted), layer)))
    return tuple(chosen)
