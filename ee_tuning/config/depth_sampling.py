"""The value of tuning.depth_sampling: at which depths a micro-batch is trained."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ee_tuning.errors import InputError


@dataclass(frozen=True)
class DepthSampling:
    """Which of the exits' losses, and of the final head's, a training micro-batch computes."""

    kind: Literal["all", "rotate", "random"]
    every: int = 1
    """Exits from one that an optimizer step trains to the next one that it trains, where `kind` is rotate."""

    @staticmethod
    def of(text: str) -> "DepthSampling":
        """Parses tuning.depth_sampling. Raises InputError on an unknown word."""
        word, colon, number = text.strip().partition(":")
        if word == "rotate" and colon and number.isdecimal() and int(number):
            return DepthSampling("rotate", int(number))
        if word not in ("all", "random") or colon:
            raise InputError(f"tuning.depth_sampling must be all, rotate:N (as in rotate:3) or random, got {text!r}")
        return DepthSampling("all" if word == "all" else "random")

    def exits(self, step: int, exit_layers: Sequence[int]) -> frozenset[int]:
        """Returns the exits that the 1-based optimizer step trains; of `random`, those that it may draw."""
        return frozenset(layer for index, layer in enumerate(exit_layers) if (index + 1 - step) % self.every == 0)

    def drawn(self, depths: Sequence[int], seed: str) -> frozenset[int]:
        """Returns those of `depths` that a micro-batch trains: all, or one, drawn by `seed`."""
        return frozenset([random.Random(seed).choice(depths)] if self.kind == "random" and depths else depths)
