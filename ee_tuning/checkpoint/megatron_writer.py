"""A Megatron-core distributed checkpoint of a model, with its exits beside the backbone's stock keys.

Stock Megatron-core loads it at any TP × PP and leaves the exits alone. Tensors are described as the whole model's, whoever writes them, so
the number of writing processes leaves no trace.
"""
import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional libraries that are not installed
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from ee_tuning.checkpoint.aside import on_first_rank, refusals_named, written_aside
from ee_tuning.checkpoint.exit_heads import CONFIG, ExitHeadsReader, check_bound_to
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.huggingface import HuggingFaceReader, read_backbone_tensor
from ee_tuning.checkpoint.manifest import check_replaceable, write_manifest
from ee_tuning.checkpoint.names import backbone_parameter_names, embedding_name
from ee_tuning.config import Config
from ee_tuning.model.config import ModelConfig, read_model_config
from ee_tuning.parallel.topology import Topology, init_parallel, leave_parallel

_LAYERS = "decoder.layers."
# A stock layer, of either spec, saves its norms as parts of the linear layers that Transformer Engine fuses them into.
_SAVED_AS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
             "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def export_megatron(config: Config, output: Path, *, overwrite: bool = False) -> None:
    """Writes model.path, with the exits of exits.path where given, to `output`: `.metadata`, `*.distcp`, `common.pt` with the arguments
    Megatron-LM asks for, config.json, and exit_config.json.

    Under a launcher the processes share the tensors. Raises InputError where model and exits do not belong together or `output` can not be
    written; then nothing is left behind.
    """
    read_model_config(Path(config.model.path))  # before the processes meet, so that a wrong word is answered at once
    topology = init_parallel(config.parallel)
    write_megatron(config, output, topology, overwrite=overwrite)
    leave_parallel()


def write_megatron(config: Config, output: Path, topology: Topology, *, overwrite: bool = False) -> None:
    """As `export_megatron`, within a world that exists; all ranks call it."""
    folder = Path(config.model.path)
    model = read_model_config(folder)
    on_first_rank(topology, lambda: check_replaceable(output, overwrite))
    with HuggingFaceReader(folder) as reader:
        on_first_rank(topology, lambda: reader.check_complete(model))
        artifact = None
        if config.exits.path is not None:
            artifact = ExitHeadsReader(Path(config.exits.path), topology, verifies=config.exits.verify)
            check_bound_to(artifact, on_first_rank(topology, lambda: fingerprint(reader, model)))
            artifact.check_complete(model)
        with written_aside(output, topology) as partial:
            state = _share(_backbone(reader, model) + (_exits(artifact) if artifact else []), topology)
            dist_checkpointing.save({**state, "args": _arguments(model), "checkpoint_version": 3.0, "iteration": 0}, str(partial))
            topology.barrier()
            on_first_rank(topology, lambda: _finish(partial, output, folder, artifact))


class _Tensor:
    """A tensor of the checkpoint that some rank will read and write."""

    def __init__(self, key: str, read: Any, layer: int | None = None, num_layers: int = 1):
        self.key, self.read, self.layer, self.num_layers = key, read, layer, num_layers

    def sharded(self) -> ShardedTensor:
        """Read now, whole; of a layer, as one of `num_layers` along a new first axis."""
        data = self.read().contiguous()
        if self.layer is None:
            return ShardedTensor.from_rank_offsets(self.key, data)
        return ShardedTensor.from_rank_offsets(self.key, data, (0, self.layer, self.num_layers), prepend_axis_num=1)


def _backbone(reader: HuggingFaceReader, model: ModelConfig) -> list[_Tensor]:
    tensors = []
    for parameter in backbone_parameter_names(model):
        if parameter == "output_layer.weight" and model.ties_embeddings:
            continue  # a tied model saves the word embedding alone
        def read(parameter: str = parameter) -> torch.Tensor:
            return read_backbone_tensor(reader, model, parameter, 1, 0, reader.dtype(embedding_name(model)))
        if not parameter.startswith(_LAYERS):
            tensors.append(_Tensor(parameter, read))
            continue
        layer, _, name = parameter.removeprefix(_LAYERS).partition(".")
        tensors.append(_Tensor(_LAYERS + _SAVED_AS.get(name, name), read, int(layer), model.num_layers))
    return tensors


def _exits(artifact: ExitHeadsReader) -> list[_Tensor]:
    return [_Tensor(name, lambda name=name: artifact.full(name)) for name in artifact.names()]


def _share(tensors: list[_Tensor], topology: Topology) -> dict[str, ShardedTensor | ShardedObject]:
    """This rank's part of the checkpoint; Transformer Engine's empty extra states, which stock layers ask for, come from rank 0."""
    state: dict[str, ShardedTensor | ShardedObject] = {}
    for each in tensors[topology.rank::topology.world_size]:
        state[f"{each.key}@{each.layer}"] = each.sharded()
    if topology.rank == 0:
        for layer, num_layers in sorted({(each.layer, each.num_layers) for each in tensors if each.layer is not None}):
            for name in _EXTRA_STATES:
                key = f"{_LAYERS}{name}._extra_state"
                state[f"{key}@{layer}"] = ShardedObject(key, None, (num_layers,), (layer,))
    return state


def _arguments(model: ModelConfig) -> argparse.Namespace:
    """The model's shape in the words of Megatron-LM's command line, as its own checkpoints carry it."""
    return argparse.Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, group_query_attention=True, num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels, max_position_embeddings=model.max_position_embeddings, seq_length=model.max_position_embeddings,
        norm_epsilon=model.norm_epsilon, normalization="RMSNorm", swiglu=True, add_bias_linear=False, add_qkv_bias=False,
        untie_embeddings_and_output_weights=not model.ties_embeddings, position_embedding_type="rope", rotary_base=int(model.rope.theta),
        rotary_percent=1.0, use_rope_scaling=model.rope.kind == "llama3", rope_scaling_factor=model.rope.factor,
        vocab_size=model.vocab_size, padded_vocab_size=model.vocab_size)


def _finish(partial: Path, output: Path, folder: Path, artifact: ExitHeadsReader | None) -> None:
    with refusals_named(output):
        shutil.copyfile(folder / "config.json", partial / "config.json")
        if artifact is not None:
            tree = json.loads((artifact.folder / CONFIG).read_text())
            (partial / CONFIG).write_text(json.dumps(tree, indent=2) + "\n")
        write_manifest(partial)
