"""Files of a Hugging Face folder to be written: the source of their blocks, and their sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.non_finite import NonFiniteCheck
from ee_tuning.storage.safetensors_layout import SafetensorsLayout
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_blocks import stored_blocks, tensor_blocks
from ee_tuning.storage.tensor_source import TensorSource


@dataclass(frozen=True, eq=False)
class FileToWrite:
    """A file to write. `blocks(watch)` yields its content in order; `watch` checks the tensors for non-finite
    values.
    """

    name: str
    num_bytes: int
    blocks: Callable[[NonFiniteCheck], Iterator[Tensor | bytes]]
    link_to: Path | None = None
    """File to link to instead of writing. The blocks are then read only for their checksum."""


def copied_file(folder: SafetensorsFolder, name: str, *, is_linked: bool = False) -> FileToWrite:
    """Copies a safetensors file of a folder byte for byte."""
    path, file = folder.folder / name, folder.file(name)
    start = min((entry.begin for entry in file.entries.values()), default=path.stat().st_size)

    def blocks(watch: NonFiniteCheck) -> Iterator[Tensor | bytes]:
        with path.open("rb") as stream:
            yield stream.read(start)
        for tensor in sorted(file.entries, key=lambda tensor: (file.entries[tensor].begin, file.entries[tensor].end)):
            yield from watch.checked(tensor, stored_blocks(file, tensor))

    return FileToWrite(name, path.stat().st_size, blocks, path.resolve() if is_linked else None)


def backbone_layout(source: TensorSource, model: ModelConfig) -> SafetensorsLayout:
    """Returns the layout of a backbone as a Hugging Face folder: Hugging Face's names, each tensor in its stored
    dtype.
    """
    shapes = backbone_tensor_shapes(model)
    return SafetensorsLayout("model", shapes, {name: source.dtype(name) for name in shapes})


def backbone_files(source: TensorSource, layout: SafetensorsLayout) -> list[FileToWrite]:
    """Returns the files of `layout`, with tensors read from `source`."""
    return joined_files(source, layout, {name: [name] for name in layout.shapes})


def joined_files(
    source: TensorSource, layout: SafetensorsLayout, parts: Mapping[str, Sequence[str]]
) -> list[FileToWrite]:
    """Returns the files of `layout`, each of whose tensors concatenates the tensors `parts` of `source`."""

    def blocks_of(file: str) -> Callable[[NonFiniteCheck], Iterator[Tensor | bytes]]:
        def blocks(watch: NonFiniteCheck) -> Iterator[Tensor | bytes]:
            yield layout.headers[file]
            for tensor in layout.files[file]:
                for part in parts[tensor]:
                    yield from watch.checked(part, tensor_blocks(source, part))

        return blocks

    return [FileToWrite(file, layout.file_bytes(file), blocks_of(file)) for file in layout.files]
