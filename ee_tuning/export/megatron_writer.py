"""Writes a model as a Megatron-core distributed checkpoint, with its exits beside the backbone's stock keys.

Stock Megatron-core loads it at any TP × PP and ignores the exits. Tensors are described as whole ones, so the number of
writing processes leaves no trace.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.artifact.exit_config import CONFIG, exit_config_tree
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.artifact.exit_vocab import write_token_ids
from ee_tuning.checkpoint.megatron import stacked_names
from ee_tuning.checkpoint.megatron_source import norm_alias
from ee_tuning.checkpoint.names import backbone_parameter_names, backbone_shard
from ee_tuning.config import Config
from ee_tuning.export.export_source import ExportSource, check_target, open_for_export
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.megatron_args import megatron_arguments, missing_from_megatron_args
from ee_tuning.notices import warn
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.distcp_writer import Chunk, DistcpWriter, StoredChunk, write_common, write_metadata
from ee_tuning.storage.metadata_pickle import METADATA
from ee_tuning.storage.non_finite import NonFiniteCheck, warn_non_finite
from ee_tuning.storage.shared_folder import write_shared_folder
from ee_tuning.storage.tensor_blocks import parameter_blocks, parameter_dtype, tensor_blocks
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource

MARKS = (METADATA, "common.pt", "config.json")
"""File patterns that identify an export of this format, and not a checkpoint of a run."""
_LINEAR = re.compile(r"(.+\.linear_(?:qkv|proj|fc1|fc2))\.weight")


def write_megatron(config: Config, output: Path, topology: Topology | None = None, *, overwrite: bool = False) -> None:
    """Writes model.path, in any format, with the exits of exits.path, if given, to `output`.

    The folder holds `.metadata`, `*.distcp`, `common.pt` with the arguments for Megatron-LM, config.json and
    exit_config.json. All ranks call it and share the tensors. Raises InputError where model and exits do not belong
    together or `output` can not be written; nothing is left behind then.
    """
    on_first_rank(topology, lambda: check_target(config, output, overwrite, MARKS))
    with open_for_export(config, topology) as model:
        write_megatron_folder(model, output, topology)


def write_megatron_folder(
    model: ExportSource, output: Path, topology: Topology | None, *, card: str | None = None
) -> None:
    """Does the work of `write_megatron` for an opened model, with `card` as README.md."""
    tensors = [*_backbone(model.source, model.model), *(_exits(model.artifact) if model.artifact else ())]
    sizes, rank = {each: each.num_bytes for each in tensors}, 0 if topology is None else topology.rank

    def write(temporary: Path, own: list[_Tensor], advance: Advance) -> _RankReport:
        watch = NonFiniteCheck()
        with DistcpWriter(temporary, rank, advance) as writer:
            if rank == 0:
                _add_extra_states(writer, model.model)
            for each in own:
                writer.add_tensor(each.chunk, watch.checked(each.name, each.blocks()))
        model.finish_check()
        return _RankReport(writer.written, writer.sums, watch.lines())

    write_shared_folder(
        output,
        topology,
        sizes,
        write,
        lambda temporary, reports: _complete(model, temporary, output, reports, card),
        num_bytes=sum(sizes.values()),
        description="writing the model",
    )


@dataclass(frozen=True)
class _RankReport:
    """The chunks, checksums and warnings of a process."""

    written: list[StoredChunk]
    sums: dict[str, str]
    warnings: list[str]


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the checkpoint, which some process will read and write."""

    chunk: Chunk
    name: str
    """The name for messages."""
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def num_bytes(self) -> int:
        """The size of its data in bytes."""
        return torch.Size(self.chunk.sizes).numel() * self.chunk.dtype.itemsize


def _backbone(source: TensorSource, model: ModelConfig) -> Iterator[_Tensor]:
    """Yields the backbone's tensors as stock Megatron-core stores them.

    A layer's parameter is one of `num_layers` entries along a new first axis, an expert's one of all experts along
    another. A stock layer saves its norms within the linear maps into which Transformer Engine fuses them; before
    experts its two specs disagree on that, and the norm gets both names. A tied model saves the word embedding only.
    """
    for parameter in backbone_parameter_names(model):
        if parameter == "output_layer.weight" and model.ties_embeddings:
            continue
        shard = backbone_shard(parameter, model, 1, 0)
        dtype = parameter_dtype(source, shard)
        key, stack, entry = _stacked(parameter, model)
        names = {norm_alias(key)} | ({key} if model.num_experts and ".pre_mlp_layernorm." in key else set())
        for name in sorted(names):
            offsets, sizes = (*entry, *(0,) * len(shard.shape)), (*(1,) * len(entry), *shard.shape)
            chunk = Chunk(name, dtype, (*stack, *shard.shape), offsets, sizes)
            yield _Tensor(chunk, parameter, partial(parameter_blocks, source, shard, dtype))


def _stacked(parameter: str, model: ModelConfig) -> tuple[str, TensorShape, TensorShape]:
    """Returns a parameter's name in the checkpoint, the number of stacked entries, and its entry. Layers that differ
    stand alone.
    """
    names = stacked_names(parameter)
    key, entry = names[0 if model.dense_layers else len(names) // 2]
    return (
        key,
        ((model.num_experts,) if model.dense_layers else (model.num_layers, model.num_experts))[: len(entry)],
        entry,
    )


def _exits(artifact: ExitHeadsReader) -> Iterator[_Tensor]:
    for name in artifact.names():
        shape: TensorShape = artifact.shape(name)
        yield _Tensor(
            Chunk(name, artifact.dtype(name), shape, (0,) * len(shape), shape),
            name,
            partial(tensor_blocks, artifact, name),
        )


def _add_extra_states(writer: DistcpWriter, model: ModelConfig) -> None:
    """Adds Transformer Engine's states, which stock layers expect: empty objects."""
    for parameter in backbone_parameter_names(model):
        if linear := _LINEAR.fullmatch(parameter):
            key, stack, entry = _stacked(linear[1] + "._extra_state", model)
            writer.add_object(
                f"{key}/shard_{'.'.join(map(str, entry or (0,)))}_{'.'.join(map(str, stack or (1,)))}", [None]
            )


def _complete(
    model: ExportSource, temporary: Path, output: Path, reports: list[_RankReport], card: str | None
) -> dict[str, str]:
    warn_non_finite(model.source.folder, [line for report in reports for line in report.warnings])
    for what in missing_from_megatron_args(model.model):
        warn(
            f"{output}: Megatron-LM's arguments have no argument for {what}; config.json has it: code that runs "
            "these weights has to know"
        )
    arguments = argparse.Namespace(**megatron_arguments(model.model))
    write_common(temporary, {"args": arguments, "checkpoint_version": 3.0, "iteration": 0})
    described = {key: value for key, value in model.described().items() if key not in ("early_exit", "auto_map")}
    (temporary / "config.json").write_text(to_json(described, indent=2) + "\n", encoding="utf-8")
    if model.artifact is not None:
        write_token_ids(temporary, model.artifact.config.token_ids)
        (temporary / CONFIG).write_text(
            to_json(exit_config_tree(model.artifact.config), indent=2) + "\n", encoding="utf-8"
        )
    if card is not None:
        (temporary / "README.md").write_text(card, encoding="utf-8")
    write_metadata(temporary, [each for report in reports for each in report.written])
    return {file: digest for report in reports for file, digest in report.sums.items()}
