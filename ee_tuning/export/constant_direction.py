"""Finds a direction in which an exit's states are nearly constant, so that a bias can be folded into its output
matrix.
"""

import torch
from torch import Tensor

from ee_tuning.config import Config, replace
from ee_tuning.errors import InputError
from ee_tuning.export.check import load_to_compare
from ee_tuning.model.fit import RIDGE
from ee_tuning.parallel.topology import destroy_parallel

MAX_TOKENS = 4096


@torch.no_grad()
def constant_direction(config: Config, layer: int, text: str) -> Tensor:  # [h] float64
    """Returns the least-squares u, argmin Σ (uᵀz − 1)² + λ ‖u‖², over the states z of the exit after `layer` on the
    text.

    z are the states that the exit's linear map reads. Runs in one process. Raises InputError where the exit has no
    linear map, or like `check_export`.
    """
    topology, loaded, ids = load_to_compare(replace(config, model={"dtype": "float32"}), text, MAX_TOKENS)
    model = loaded.model
    head = model.exit_head(layer)
    if not head.spec.has_linear:
        raise InputError(
            f"--fold-bias is for an exit with a linear map, and the exit after layer {layer} has none; leave it out"
        )
    _, inputs = model.run_layers(model.embed(ids.to(topology.device)))
    states = head.own_hidden(inputs[layer])[:, 0].double().cpu()
    destroy_parallel()
    gram = states.T @ states
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, states.sum(0))
