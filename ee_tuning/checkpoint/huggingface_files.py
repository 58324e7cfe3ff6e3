"""The files of a Hugging Face folder to be written: where the blocks of each come from, and how large it will be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.checkpoint.non_finite import NonFiniteCheck
from ee_tuning.checkpoint.safetensors_layout import SafetensorsLayout
from ee_tuning.checkpoint.safetensors_reader import SafetensorsFolder, TensorSource
from ee_tuning.checkpoint.tensor_blocks import stored_blocks, tensor_blocks
from ee_tuning.model.config import ModelConfig


@dataclass(frozen=True, eq=False)
class FileToWrite:
    """`blocks(watch)` yields its content from beginning to end; `watch` sees the tensors pass."""

    name: str
    num_bytes: int
    blocks: Callable[[NonFiniteCheck], Iterator[Tensor | bytes]]
    link_to: Path | None = None
    """The file that it is linked to instead of being written; its blocks are then read for their sum alone."""


def copied_file(folder: SafetensorsFolder, name: str, *, is_linked: bool = False) -> FileToWrite:
    """A file of a folder of safetensors, byte for byte."""
    path, file = folder.folder / name, folder.file(name)
    start = min((entry.begin for entry in file.entries.values()), default=path.stat().st_size)

    def blocks(watch: NonFiniteCheck) -> Iterator[Tensor | bytes]:
        with path.open("rb") as stream:
            yield stream.read(start)
        for tensor in sorted(file.entries, key=lambda tensor: (file.entries[tensor].begin, file.entries[tensor].end)):
            yield from watch.checked(tensor, stored_blocks(file, tensor))

    return FileToWrite(name, path.stat().st_size, blocks, path.resolve() if is_linked else None)


def backbone_layout(source: TensorSource, model: ModelConfig) -> SafetensorsLayout:
    """How a backbone that is in no Hugging Face folder lies in one: in Hugging Face's names, each tensor in the dtype
    that it has.
    """
    shapes = backbone_tensor_shapes(model)
    return SafetensorsLayout("model", shapes, {name: source.dtype(name) for name in shapes})


def backbone_files(source: TensorSource, layout: SafetensorsLayout) -> list[FileToWrite]:
    """The files of `layout`, whose tensors are read from `source`."""
    return joined_files(source, layout, {name: [name] for name in layout.shapes})


def joined_files(
    source: TensorSource, layout: SafetensorsLayout, parts: Mapping[str, Sequence[str]]
) -> list[FileToWrite]:
    """The files of `layout`, each of whose tensors is made of `parts` of it from `source`, one after the other."""

    def blocks_of(file: str) -> Callable[[NonFiniteCheck], Iterator[Tensor | bytes]]:
        def blocks(watch: NonFiniteCheck) -> Iterator[Tensor | bytes]:
            yield layout.headers[file]
            for tensor in layout.files[file]:
                for part in parts[tensor]:
                    yield from watch.checked(part, tensor_blocks(source, part))

        return blocks

    return [FileToWrite(file, layout.file_bytes(file), blocks_of(file)) for file in layout.files]
