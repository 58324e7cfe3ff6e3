"""The classes of heads by architecture. A new architecture is a class and a line here."""

from ee_tuning.config import Architecture
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.model.exit_head import (
    AdapterHead,
    EmbeddingHead,
    ExitHead,
    LayerHead,
    LinearHead,
    MLPHead,
    NormHead,
)

HEAD_CLASSES: dict[Architecture, type[ExitHead]] = {
    "embedding": EmbeddingHead,
    "norm": NormHead,
    "linear": LinearHead,
    "mlp": MLPHead,
    "layer": LayerHead,
    "adapter": AdapterHead,
    "eagle3": Eagle3Head,
}
