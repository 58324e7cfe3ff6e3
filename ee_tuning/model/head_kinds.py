"""The classes of heads by architecture. A new architecture is a class and a line here."""

import torch
from torch import Tensor

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
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology

_CLASSES: dict[Architecture, type[ExitHead]] = {
    "embedding": EmbeddingHead,
    "norm": NormHead,
    "linear": LinearHead,
    "mlp": MLPHead,
    "layer": LayerHead,
    "adapter": AdapterHead,
    "eagle3": Eagle3Head,
}


def build_exit_head(
    spec: ExitSpec,
    config: ModelConfig,
    topology: Topology,
    *,
    dtype: torch.dtype,
    tied_weight: Tensor | None,
    angles: Tensor,
    cuts_sequence: bool = False,
) -> ExitHead:
    """Builds the head that `spec` describes, with the arguments of ExitHead. Weights are uninitialized."""
    return _CLASSES[spec.architecture](
        spec, config, topology, dtype=dtype, tied_weight=tied_weight, angles=angles, cuts_sequence=cuts_sequence
    )
