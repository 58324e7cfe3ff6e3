"""`ee-tuning verify`: checks this project's files against their manifests, and other models as far as their format
allows: headers, index, sizes, stored checksums, non-finite values, and whether the tensors are the model's. It reports
what the format does not allow to check.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ee_tuning.checkpoint.adapter import refuse_adapter
from ee_tuning.checkpoint.formats import COMMON, has_weights, model_folder, open_model
from ee_tuning.checkpoint.gguf_file import GgufReader, is_gguf
from ee_tuning.checkpoint.legacy import LegacyCheckpoint, is_legacy
from ee_tuning.checkpoint.megatron import DistributedCheckpoint
from ee_tuning.config import ModelSection
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json
from ee_tuning.storage.manifest import MANIFEST, check_file, file_names, holds_manifest, read_manifest
from ee_tuning.storage.metadata_pickle import METADATA
from ee_tuning.storage.non_finite import NonFiniteCheck
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_blocks import BLOCK_BYTES, stored_blocks
from ee_tuning.storage.torch_file import Archive, StoredTensor, saved_arguments

_REMEDY = "fetch or make the folder again"


def verify_folder(folder: Path, *, trust_pickle: bool = False) -> bool:
    """Prints one line per checked file. Returns False where the model holds NaN or infinity.

    It checks an artifact, a run's checkpoint or an export; in a run folder, all of these; of a model without a
    manifest, its files and all of this project's folders inside. `trust_pickle` is as in the model section. Raises
    InputError, naming the file, at the first one that is missing or altered, and where `folder` holds nothing that can
    be checked.
    """
    if holds_manifest(folder):
        _check_manifest(folder)
        return True
    if is_gguf(folder):
        return _verify_foreign(folder, trust_pickle=trust_pickle)
    if not folder.is_dir():
        raise InputError(f"verify takes a folder or a GGUF file, and {folder} is not there")
    within = sorted(path.parent for path in folder.glob(f"**/{MANIFEST}") if holds_manifest(path.parent))
    is_finite = _verify_foreign(folder, trust_pickle=trust_pickle) if has_weights(folder) or not within else True
    for each in within:
        _check_manifest(each)
    return is_finite


def _check_manifest(folder: Path) -> None:
    files = read_manifest(folder, _REMEDY)
    for name, entry in files.items():
        check_file(folder / name, entry, _REMEDY)
        # A large folder takes minutes, so each is reported when done.
        print(f"{folder / name}  whole, {entry['bytes']:,} bytes", flush=True)
    for name in file_names(folder):
        if name not in files and name != MANIFEST:
            print(f"{folder / name}  not in the manifest, not checked")


def _verify_foreign(path: Path, *, trust_pickle: bool = False) -> bool:
    """Prints a line per file, then what could not be checked. Returns whether all values are finite.

    `trust_pickle` is as in the model section. Raises InputError, naming the file, at the first damage, and where `path`
    holds no model in a known format.
    """
    folder, watch = model_folder(str(path)), NonFiniteCheck()
    _check_descriptions(folder, trust_pickle)
    if is_gguf(folder):
        facts = _gguf(folder, watch)
    elif (folder / METADATA).is_file():
        facts = _distributed(folder, watch)
    elif is_legacy(folder):
        facts = _legacy(folder, watch, trust_pickle)
    else:
        facts = _huggingface(folder, watch)
    for line in [*_against_shape(folder, trust_pickle), *facts]:
        print(f"{folder}  {line}")
    for line in watch.lines():
        print(f"{folder}  {line}")
    return not watch.counts


def _check_descriptions(folder: Path, trust_pickle: bool) -> None:
    """Raises InputError where a small file of a folder is damaged or malicious, in any family."""
    if is_gguf(folder):
        return
    refuse_adapter(folder)
    try:
        read_json(folder / "config.json")
    except OSError:  # a Megatron checkpoint needs none
        pass
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if (common := folder / COMMON).is_file():
        saved_arguments(Archive(common, MappedFile(common), is_trusted=trust_pickle).content)


def _huggingface(folder: Path, watch: NonFiniteCheck) -> list[str]:
    with SafetensorsFolder(folder, "model") as reader:
        for name in sorted(set(reader.files.values())):
            file = reader.file(name)
            for tensor in file.entries:
                for _ in watch.checked(tensor, stored_blocks(file, tensor)):
                    pass
            size = (folder / name).stat().st_size
            print(
                f"{folder / name}  header and sizes sound, {len(file.entries)} tensors, {size:,} bytes read", flush=True
            )
    return ["not checked: the values; safetensors keeps no checksums, so an altered byte of a tensor shows nowhere"]


def _gguf(path: Path, watch: NonFiniteCheck) -> list[str]:
    with GgufReader(path) as reader:
        for name in reader.names():
            rows = max(1, BLOCK_BYTES // (4 * math.prod(reader.shape(name)[1:])))
            size = reader.shape(name)[0]
            for _ in watch.checked(
                name, (reader.rows(name, start, min(start + rows, size)) for start in range(0, size, rows))
            ):
                pass
        print(
            f"{path}  header and sizes sound, {len(reader.names())} tensors, {path.stat().st_size:,} bytes", flush=True
        )
    return ["not checked: the values; GGUF keeps no checksums, so an altered byte of a tensor shows nowhere"]


def _distributed(folder: Path, watch: NonFiniteCheck) -> list[str]:
    checkpoint, counts = DistributedCheckpoint(folder), dict[str, int]()
    for key, file, tensor in checkpoint.stored_tensors():
        _check_tensor(key, tensor, watch)
        counts[file] = counts.get(file, 0) + 1
    for file, num in counts.items():
        print(f"{folder / file}  {num} tensors, their stored checksums agree", flush=True)
    return ["not checked: what are no tensors in it (random states, empty states of fused modules)"]


def _legacy(folder: Path, watch: NonFiniteCheck, trust_pickle: bool) -> list[str]:
    counts = dict[Path, int]()
    for table in LegacyCheckpoint(folder, is_trusted=trust_pickle).tables:
        for key, tensor in table.items():
            _check_tensor(key, tensor, watch)
            counts[tensor.archive.path] = counts.get(tensor.archive.path, 0) + 1
    for path, num in counts.items():
        print(f"{path}  {num} tensors of the model, their stored checksums agree", flush=True)
    return ["not checked: the optimizer's and random states beside the model"]


def _check_tensor(key: str, tensor: StoredTensor, watch: NonFiniteCheck) -> None:
    tensor.check()
    for _ in watch.checked(key, _blocks(tensor)):
        pass


def _blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    flat = tensor.mapped().reshape(-1)
    for start in range(0, len(flat), BLOCK_BYTES):
        yield flat[start : start + BLOCK_BYTES]
        tensor.release()


def _against_shape(folder: Path, trust_pickle: bool) -> list[str]:
    """Returns a line that says whether the tensors match config.json or the saved arguments.

    Raises InputError where they do not match.
    """
    try:
        source, config, _ = open_model(ModelSection(path=str(folder), trust_pickle=trust_pickle))
    except InputError as error:
        return [f"not checked: whether the tensors are those of the model ({error})"]
    with source:
        source.check_complete(config)
    return [f"the tensors are those of a {config.family} with {config.num_layers} layers"]
