"""The exit-heads artifact: a small folder beside the backbone, bound to it by a fingerprint.

It holds `exit_config.json`, `exit_heads.safetensors` (or shards and their index) with whole tensors under Hugging
Face's names, `manifest.json`, and `exit_vocab.json` where the exits have a shortlist. Any TP × PP reads it by slices,
and every layout writes the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.artifact.eagle3_card import eagle3_artifact_card
from ee_tuning.artifact.exit_config import CONFIG, ExitHeadsConfig, exit_config_tree, read_exit_config
from ee_tuning.artifact.exit_names import exit_shard
from ee_tuning.artifact.exit_vocab import VOCAB, write_token_ids
from ee_tuning.checkpoint.model_card import artifact_card
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.progress import Advance
from ee_tuning.storage.hashed_file import HashedFile
from ee_tuning.storage.manifest import MANIFEST, check_manifest, read_manifest
from ee_tuning.storage.safetensors_layout import SafetensorsLayout
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.shared_folder import write_shared_folder
from ee_tuning.storage.tensor_folder import write_tensor_folder
from ee_tuning.storage.tensor_source import ShardSource

STEM, CARD = "exit_heads", "README.md"
EXIT_SHARD_BYTES = 1_000_000_000
"""Largest size of a file: small enough that the exits of a large model have several, which processes share."""
_REMEDY = "fetch or convert the exits again"


class ExitHeadsReader(SafetensorsFolder):
    """An artifact with a checked manifest: `config` and, by slices, its tensors.

    With a topology all ranks open it together, share the checking and agree on the result. Without `verifies` the
    manifest is not read. Raises InputError, naming the file, where anything is missing, altered or of another format.
    """

    def __init__(self, folder: Path, topology: Topology | None = None, *, verifies: bool = True):
        check_is_artifact(folder)
        if verifies:
            check_manifest(folder, _REMEDY, topology)
        self.config = read_exit_config(folder)
        super().__init__(folder, STEM)
        self.digest: str | None = None
        """sha256 of the heads' weights and their shortlist, from the sums of their files; None if the manifest is not
        read.
        """
        if not verifies:
            return
        manifest = read_manifest(folder, _REMEDY)
        own = {VOCAB} if self.config.token_ids else set()
        for file in sorted({CONFIG, *own, *self.files.values()} - set(manifest)):
            holder = folder if file in (CONFIG, VOCAB) else self.table
            raise InputError(f"{folder / MANIFEST} does not list {file}, which {holder} holds; {_REMEDY}")
        sums = sorted((file, manifest[file]["sha256"]) for file in {*own, *self.files.values()})
        self.digest = hashlib.sha256(to_json(sums).encode()).hexdigest()

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a tensor is missing, has a shape that does not fit the backbone, or belongs to no
        exit head.
        """
        config.check_exit_layers(self.config.exit_layers)
        expected = self.config.tensor_shapes(config)
        for name, shape in expected.items():
            self.check_shape(name, shape)
        for name in self.names():
            if name not in expected:
                raise InputError(
                    f"{self.folder / self.files[name]}: tensor {name} is no part of what {CONFIG} describes; {_REMEDY}"
                )


def read_exit_tensor(
    source: ShardSource, config: ModelConfig, head: ExitSpec, parameter: str, tp: int, tp_rank: int, dtype: torch.dtype
) -> Tensor:
    """Returns rank `tp_rank`'s part of a parameter (`exit_parameter_names`) of an exit head."""
    return source.shard(exit_shard(head, parameter, config, tp, tp_rank), dtype)


def check_bound_to(artifact: ExitHeadsReader, fingerprint: str) -> None:
    """Raises InputError where the artifact belongs to another backbone than the one with this fingerprint."""
    bound = artifact.config.model_fingerprint
    if bound != fingerprint:
        raise InputError(
            f"exits must be used with the model they were made for: {artifact.folder} is bound to "
            f"{artifact.config.model_name} (fingerprint {bound[:16]}…), and this model's fingerprint is {fingerprint[:16]}…; "
            "give that model, or convert this one"
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Raises InputError where `output` exists and is neither empty nor an artifact that may be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise InputError(
            f"{output} exists already; give --overwrite to replace an exit-heads artifact, or another --output"
        )
    if not output.is_dir() or not (output / CONFIG).is_file():
        raise InputError(
            f"--overwrite replaces an exit-heads artifact only, and {output} is none; give another --output"
        )
    own = (CONFIG, VOCAB, MANIFEST, CARD, "calibration.json")
    unexpected_files = [p.name for p in output.iterdir() if p.name not in own and not p.name.startswith(STEM)]
    if unexpected_files:
        raise InputError(
            f"--overwrite would remove {output / unexpected_files[0]}, which is no part of an artifact; move it away first"
        )


def save_exit_heads(
    output: Path,
    exits: ExitHeadsConfig,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    topology: Topology | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = EXIT_SHARD_BYTES,
) -> None:
    """Writes an artifact from whole tensors named as in `exits.tensor_shapes`, as they come.

    With a topology all ranks save together: every rank iterates over `tensors` (which may run collectives), and each
    tensor comes from exactly one rank. The folder is written atomically. Raises InputError where `output` exists
    (check_output) or the disk refuses.
    """
    on_first_rank(topology, lambda: check_output(output, overwrite))
    shapes = exits.tensor_shapes(config)
    write_tensor_folder(
        output,
        topology,
        tensors,
        STEM,
        shapes,
        exits.torch_dtype,
        lambda partial: _write_description(partial, exits),
        shard_bytes=shard_bytes,
    )


def write_exit_heads(
    output: Path,
    exits: ExitHeadsConfig,
    config: ModelConfig,
    blocks: Callable[[str], Iterable[Tensor]],
    topology: Topology | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = EXIT_SHARD_BYTES,
) -> None:
    """Like `save_exit_heads`, for tensors that any process can make, block of rows by block.

    The processes share the files, and each file is hashed while it is written.
    """
    on_first_rank(topology, lambda: check_output(output, overwrite))
    layout = SafetensorsLayout(STEM, exits.tensor_shapes(config), exits.torch_dtype, shard_bytes)

    def write(partial: Path, own: list[str], advance: Advance) -> dict[str, str]:
        sums = {}
        for file in own:
            with HashedFile(partial / file) as made:
                advance(made.write(layout.headers[file]))
                for name in layout.files[file]:
                    for block in blocks(name):
                        advance(made.write(block.to(exits.torch_dtype).contiguous()))
            sums[file] = made.sha256
        return sums

    def complete(partial: Path, reports: list[dict[str, str]]) -> dict[str, str]:
        layout.write_index(partial)
        _write_description(partial, exits)
        return {file: digest for sums in reports for file, digest in sums.items()}

    sizes = {file: layout.file_bytes(file) for file in layout.files}
    write_shared_folder(
        output, topology, sizes, write, complete, num_bytes=layout.num_bytes, description="writing exit heads"
    )


def check_is_artifact(folder: Path) -> None:
    """Raises InputError where `folder` is no exit-heads artifact."""
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"an exit-heads artifact must hold {CONFIG}, and {folder} does not; make one with `ee-tuning convert`"
        )


def _write_description(partial: Path, exits: ExitHeadsConfig) -> None:
    tree = exit_config_tree(exits)
    write_token_ids(partial, exits.token_ids)
    (partial / CONFIG).write_text(to_json(tree, indent=2) + "\n", encoding="utf-8")
    (partial / CARD).write_text((eagle3_artifact_card if exits.draft else artifact_card)(tree), encoding="utf-8")
