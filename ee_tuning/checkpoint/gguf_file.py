"""The backbone, read in place from a GGUF file (llama.cpp's): tensor by tensor, dequantized on the way, under Hugging
Face's names.

The package `gguf` knows the layout and the block formats. A file that is cut short, damaged or of an unknown kind is
refused.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ee_tuning.checkpoint.names import TensorShape, backbone_tensor_shapes
from ee_tuning.checkpoint.tensor_blocks import BLOCK_BYTES
from ee_tuning.checkpoint.unread import unread
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig, model_config_from_hf
from ee_tuning.model.gguf_config import config_of_gguf

SUFFIX = ".gguf"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)")


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file by its name."""
    return path.suffix == SUFFIX and path.is_file()


def tokenizer_digest(path: Path) -> str:
    """sha256, in hex, of the fields that make the tokenizer. Raises InputError as GgufReader does."""
    return _parsed(path, path.stat().st_mtime_ns).tokenizer_digest


class GgufReader:
    """Tensors of a GGUF file under Hugging Face's names; see BackboneSource. A context manager.

    Raises InputError, naming the file, where it is no GGUF file, is not whole, or holds a model that is not supported.
    """

    manifest_verified = False

    def __init__(self, path: Path):
        self.folder = path
        """The file: what tells a model's files apart for people, and has no manifest."""
        content = _parsed(path, path.stat().st_mtime_ns)
        self.fields: Mapping[str, Any] = content.fields
        self._tensors = {_huggingface_name(name): tensor for name, tensor in content.tensors.items()}
        factors = self._tensors.pop(_ROPE_FACTORS, None)
        embedding = self._tensors.get("model.embed_tokens.weight")
        self.description = config_of_gguf(
            self.fields,
            vocab_size=0 if embedding is None else self._shape_of(embedding)[0],
            has_output="lm_head.weight" in self._tensors,
            rope_factors=None if factors is None else np.asarray(factors.data),
            path=path,
        )
        """The model's config.json, as far as the file tells it."""
        if embedding is not None:
            self.description["dtype"] = str(self.dtype("model.embed_tokens.weight")).removeprefix("torch.")
        self.config = model_config_from_hf(self.description, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing: the file is mapped, not held open."""

    def names(self) -> list[str]:
        """Every tensor there is, sorted."""
        return sorted(self._tensors)

    def weight_files(self) -> set[str]:
        """The file's name: it is all there is."""
        return {self.folder.name}

    def shape(self, name: str) -> TensorShape:
        """Shape of the whole tensor."""
        return self._shape_of(self._tensor(name))

    def dtype(self, name: str) -> torch.dtype:
        """dtype of the values: as stored, or float32, in which quantized ones are exact."""
        return _FLOATS.get(self.stored_type(name), torch.float32)

    def stored_type(self, name: str) -> str:
        """GGUF's name of how a tensor is stored. Raises InputError where that is not supported."""
        stored: str = self._tensor(name).tensor_type.name
        if stored not in _FLOATS and stored not in _QUANTIZED:
            raise InputError(
                f"{self.folder}: tensor {name} is stored as {stored}, and GGUF is read in "
                f"{', '.join((*_FLOATS, *_QUANTIZED))}; give a file in one of these"
            )
        return stored

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing, has another shape, or is stored in a way that is not
        supported.
        """
        self.stored_type(name)
        if self.shape(name) != shape:
            raise InputError(
                f"{self.folder}: tensor {name} must have shape {list(shape)}, as the file's fields say, got "
                f"{list(self.shape(name))}; fetch or convert the file again"
            )

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or one is there that would be
        ignored.
        """
        expected = backbone_tensor_shapes(config)
        for name, shape in expected.items():
            self.check_shape(name, shape)
        for name in self._tensors:
            if name not in expected:
                raise unread(name, self.folder, config, "the file's fields")

    def full(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, …]: these rows, of `dtype`."""
        tensor, stored = self._tensor(name), self.stored_type(name)
        order = self._stored_order(name)
        data: NDArray = tensor.data[start:stop] if order is None else tensor.data[order[start:stop]]
        return _values(data, stored, tensor.tensor_type)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[n, stop - start]: these columns, of `dtype`. Rows are dequantized block by block: a whole matrix may take
        gigabytes.
        """
        num_rows, width = self.shape(name)
        step = max(1, BLOCK_BYTES // (4 * width))
        return torch.cat(
            [self.rows(name, row, min(row + step, num_rows))[:, start:stop] for row in range(0, num_rows, step)]
        )

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise InputError(
                f"{self.folder} holds no tensor {name}, which the model must have; fetch or convert the file again"
            )
        return self._tensors[name]

    @staticmethod
    def _shape_of(tensor: Any) -> TensorShape:
        return tuple(
            int(size) for size in reversed(tensor.shape)
        )  # GGUF names the dimension that lies together in memory first

    def _stored_order(self, name: str) -> NDArray | None:
        """Which stored row each row is, where they differ: llama.cpp rotates neighbouring dimensions of a head
        together, so its conversion interleaves the two halves of Llama's query and key heads.
        """
        match = _ROTATED.fullmatch(name)
        if match is None or self.config.family != "llama":
            return None
        heads = self.config.num_attention_heads if match[1] == "q" else self.config.num_query_groups
        return np.arange(self.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _values(data: NDArray, stored: str, kind: Any) -> Tensor:
    if stored == "BF16":
        return torch.from_numpy(np.ascontiguousarray(data).view(np.int16)).view(torch.bfloat16)
    if stored in _FLOATS:
        return torch.from_numpy(np.array(data))  # a copy: the file is mapped read-only
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(np.ascontiguousarray(data), kind))


def _huggingface_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; its own where it has none."""
    if match := _LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}" if match[2] in _LAYER_NAMES else name
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


class _Parsed:
    """What a file's header tells: fields by name, and tensors by GGUF's names, whose data are mapped."""

    def __init__(self, path: Path):
        reader = _checked_reader(path)
        # The tokenizer's lists have hundreds of thousands of items: only what describes the model is unpacked.
        self.fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) <= 1}
        self.tokenizer_digest = hashlib.sha256(
            b"".join(
                part.tobytes()
                for name, field in reader.fields.items()
                if name.startswith("tokenizer.")
                for part in field.parts
            )
        ).hexdigest()
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, mtime_ns: int) -> _Parsed:
    """Reading a header takes a second, and a command opens its model more than once; a file that has changed is another
    one.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path}: GGUF files need the package gguf, which is not installed; pip install 'ee_tuning[gguf]'"
        ) from error
    try:
        return _Parsed(path)
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror or error}") from error
    except Exception as error:  # of any kind: the reader takes the file's word for sizes and types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no whole GGUF file: {reason}; fetch it again") from error


def _checked_reader(path: Path) -> Any:
    from gguf import GGUFReader

    class Checked(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *options: Any, **more: Any) -> NDArray:
            found = super()._get(offset, dtype, count, *options, **more)
            if len(found) < int(count):  # without this, a hostile length makes it read nothing for ever
                raise ValueError(f"it ends at byte {len(self.data):,}, before what it says it holds")
            return found

    if path.stat().st_size < 24:
        raise ValueError("it is shorter than a header")
    return Checked(path)
