"""The value of tuning.trainable: which weights beside the exits' are trained."""

from dataclasses import dataclass
from typing import Literal

from ee_tuning.errors import InputError

Kind = Literal["heads", "lora", "mlp", "last", "half", "backbone", "all"]
_WORDS: dict[str, Kind] = {
    "heads": "heads",
    "lora": "lora",
    "mlp": "mlp",
    "half": "half",
    "backbone": "backbone",
    "all": "all",
}


@dataclass(frozen=True)
class Trainable:
    """The choice of weights that are trained beside the exits."""

    kind: Kind
    num_last: int = 0
    """Number of layers for `last`."""

    @staticmethod
    def of(text: str) -> "Trainable":
        """Parses tuning.trainable. Raises InputError on an unknown word."""
        word, colon, number = text.strip().partition(":")
        if word == "last" and colon and number.isdecimal() and int(number):
            return Trainable("last", int(number))
        if text not in _WORDS:
            raise InputError(
                f"tuning.trainable must be heads, lora, mlp, last:K (as in last:4), half, backbone or all, got {text!r}"
            )
        return Trainable(_WORDS[text])

    @property
    def has_backbone(self) -> bool:
        """Whether weights of the model, or beside them, are trained, so that there is a backward pass through its
        layers.
        """
        return self.kind != "heads"

    @property
    def has_embedding(self) -> bool:
        """Whether the word embedding and the output matrix are trained, too."""
        return self.kind == "all"

    def first_layer(self, num_layers: int) -> int:
        """Returns the first layer (1-based) with trained weights."""
        return num_layers - self.num_last + 1 if self.kind == "last" else 1

    def trains(self, layer: int, name: str, num_layers: int) -> bool:
        """Whether parameter `name` of a layer is one of the model's own that are trained."""
        if self.kind == "mlp":
            return name.startswith("mlp.")
        return self.kind in ("half", "backbone", "all") or (
            self.kind == "last" and layer >= self.first_layer(num_layers)
        )
