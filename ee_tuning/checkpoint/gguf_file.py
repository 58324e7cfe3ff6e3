"""Reads a backbone from a GGUF file (llama.cpp): tensor by tensor, dequantized, under Hugging Face's names.

The package `gguf` parses the layout and the block formats. A truncated, damaged or unknown file is refused.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.checkpoint.unread import unread
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig, model_config_from_hf
from ee_tuning.model_config.gguf_config import config_of_gguf
from ee_tuning.storage.tensor_blocks import BLOCK_BYTES
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource

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
    """Whether the name of `path` is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def tokenizer_digest(path: Path) -> str:
    """Returns the sha256, in hex, of the fields that define the tokenizer. Raises InputError as GgufReader does."""
    return _parsed(path, path.stat().st_mtime_ns).tokenizer_digest


class GgufReader(TensorSource):
    """The tensors of a GGUF file under Hugging Face's names; see BackboneSource. A context manager.

    Raises InputError, naming the file, where it is no complete GGUF file or holds an unsupported model.
    """

    manifest_verified = False

    def __init__(self, path: Path):
        self.folder = path
        """The file itself. It names the model in messages and has no manifest."""
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
        """The model's config.json, as far as the file describes it."""
        if embedding is not None:
            self.description["dtype"] = str(self.dtype("model.embed_tokens.weight")).removeprefix("torch.")
        self.config = model_config_from_hf(self.description, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing: the file is mapped, not held open."""

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._tensors)

    def weight_files(self) -> set[str]:
        """Returns the file's name."""
        return {self.folder.name}

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self._shape_of(self._tensor(name))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of the values: the stored one, or float32, which represents quantized values exactly."""
        return _FLOATS.get(self.stored_type(name), torch.float32)

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored in blocks of few bits."""
        return self.stored_type(name) in _QUANTIZED

    def stored_type(self, name: str) -> str:
        """Returns GGUF's name of a tensor's storage type. Raises InputError where it is not supported."""
        stored: str = self._tensor(name).tensor_type.name
        if stored not in _FLOATS and stored not in _QUANTIZED:
            raise InputError(
                f"{self.folder}: tensor {name} is stored as {stored}, and GGUF is read in "
                f"{', '.join((*_FLOATS, *_QUANTIZED))}; give a file in one of these"
            )
        return stored

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the tensor is missing, has another shape, or an unsupported storage type."""
        self.stored_type(name)
        if self.shape(name) != shape:
            raise InputError(
                f"{self.folder}: tensor {name} must have shape {list(shape)}, as the file's fields say, got "
                f"{list(self.shape(name))}; fetch or convert the file again"
            )

    def check_complete(self, config: ModelConfig) -> None:
        """Raises InputError where a backbone tensor is missing, has another shape, or would be ignored."""
        expected = backbone_tensor_shapes(config)
        for name, shape in expected.items():
            self.check_shape(name, shape)
        for name in self._tensors:
            if name not in expected:
                raise unread(name, self.folder, config, "the file's fields")

    def full(self, name: str) -> Tensor:
        """Returns the whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …] in `dtype`."""
        tensor, stored = self._tensor(name), self.stored_type(name)
        order = self._stored_order(name)
        data: NDArray = tensor.data[start:stop] if order is None else tensor.data[order[start:stop]]
        return _values(data, stored, tensor.tensor_type)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start] in `dtype`.

        Rows are dequantized block by block, because a whole matrix may take gigabytes.
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
        return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the contiguous dimension first

    def _stored_order(self, name: str) -> NDArray | None:
        """Returns the stored row of each row, or None where they are equal.

        llama.cpp rotates neighbouring dimensions of a head together, so its conversion interleaves the two halves of
        Llama's query and key heads.
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
        return torch.from_numpy(np.array(data))  # copied, because the file is mapped read-only
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(np.ascontiguousarray(data), kind))


def _huggingface_name(name: str) -> str:
    """Returns Hugging Face's name of a GGUF tensor, or its own if it has none."""
    if match := _LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}" if match[2] in _LAYER_NAMES else name
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


class _Parsed:
    """The header of a file: fields by name, and mapped tensors by GGUF's names."""

    def __init__(self, path: Path):
        reader = _checked_reader(path)
        # The tokenizer's lists have hundreds of thousands of items, so only the model's fields are unpacked.
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
    """Returns the parsed file. Cached, because parsing a header takes a second and a command opens its model more than
    once. A changed file is parsed again.
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
    except Exception as error:  # any exception: the reader trusts the file's sizes and types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no whole GGUF file: {reason}; fetch it again") from error


def _checked_reader(path: Path) -> Any:
    from gguf import GGUFReader

    class Checked(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *options: Any, **more: Any) -> NDArray:
            found = super()._get(offset, dtype, count, *options, **more)
            if len(found) < int(count):  # otherwise a hostile length would make the reader loop forever
                raise ValueError(f"it ends at byte {len(self.data):,}, before what it says it holds")
            return found

    if path.stat().st_size < 24:
        raise ValueError("it is shorter than a header")
    return Checked(path)
