"""Checkpoints as Megatron-LM's formats `torch_dcp` and `fsdp_dtensor` write them: by torch.distributed.checkpoint, with
the arguments among the tensors.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron_files import fill, num_padded, saved_arguments, stock_model, stock_parameters
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ee_tuning.config import ParallelSection
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel


def save_torch_dcp(model: str, folder: str) -> None:
    """Every rank of a world: a GPTModel with the weights of the Hugging Face folder `model`, sharded by torch's FSDP2
    as Megatron's TorchFullyShardedDataParallel does it, saved as `torch_dcp`.
    """
    topology = init_parallel(ParallelSection())
    config = read_model_config(Path(model))
    stock = stock_model(config, topology, num_padded(config.vocab_size))
    fill(stock_parameters(stock), model, config, topology)
    for layer in stock.decoder.layers:
        fully_shard(layer, mesh=topology.dp_mesh)
    fully_shard(stock, mesh=topology.dp_mesh)
    save(stock.state_dict(), model, folder)


def save_fsdp_dtensor(model: str, folder: str) -> None:
    """One process: the names of Megatron-FSDP, whose code needs CUDA. The halves of a gated MLP are apart, a layer is
    within two wrappers.
    """
    config = read_model_config(Path(model))
    stock = stock_model(config, init_parallel(ParallelSection()), num_padded(config.vocab_size))
    fill(stock_parameters(stock), model, config, init_parallel(ParallelSection()))
    tensors: dict[str, Tensor] = {}
    for name, tensor in stock.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            tensors[f"module.{name}_w"], tensors[f"module.{name}_v"] = tensor.chunk(2)
        else:
            tensors[f"module.{name}"] = tensor
    save(tensors, model, folder)


def save(tensors: dict[str, Any], model: str, folder: str) -> None:
    """What Megatron-LM saves beside the model, too, with states of an optimizer that have the model's names."""
    moments = {
        name: {"exp_avg": torch.zeros(3)}
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor | nn.Parameter)
    }
    state = {
        "args": saved_arguments(read_model_config(Path(model))),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": tensors,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "step": 100}]},
        "opt_param_scheduler": {"max_lr": 1e-4},
        "rng_state": [{"python": (3, (1, 2), None)}],
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
