"""Initial weights of exit heads, copied from the backbone or random. A source of tensors, like a checkpoint.

Each random tensor is generated whole, on the CPU, from the seed and its name, so every layout gets the same.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_names import exit_copy_source, is_residual_projection
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.non_finite import check_finite
from ee_tuning.storage.tensor_blocks import BLOCK_BYTES, tensor_blocks
from ee_tuning.storage.tensor_slice import TensorShape
from ee_tuning.storage.tensor_source import TensorSource


class InitialExits(TensorSource):
    """The initial tensors of the artifact that `exits` describes, in the artifact's dtype.

    - copy: a head's norm is the final norm, an `mlp` head's MLP that of the exit layer, a `layer` head's layer the last
      transformer layer, an output matrix the final one. An adapter's norm is the final norm, its `down` is random and
      its `up` 0, so that it adds nothing yet. A linear map is the identity.
    - random: N(0, the model's init_std); matrices that add to the residual are narrower by √(2 · layer), as in EE-LLM;
      norms are 1, biases 0.
    - fitted: like copy, with `maps` of shape [h, h + 1] by exit layer: T and, in the last column, b. They become the
      linear map, or are folded into the exit's own output matrix, W <- W T.

    A shortlisted output matrix copies the listed rows. Its last row, that of any other token, is `other` [h], or the
    mean of the unlisted rows. Reading raises InputError where the backbone holds NaN or infinity, or a number that
    overflows in the artifact's dtype.
    """

    def __init__(
        self,
        exits: ExitHeadsConfig,
        reader: TensorSource,
        config: ModelConfig,
        maps: Mapping[int, Tensor] | None = None,
        other: Tensor | None = None,
    ):
        self.exits, self.reader, self.config, self._maps, self._other = exits, reader, config, maps or {}, other
        self._folded = {
            f"exits.{head.layer}.output.weight": self._maps[head.layer][:, :-1]
            for head in exits.heads
            if head.layer in self._maps and not head.has_linear
        }
        self.shapes = exits.tensor_shapes(config)

    def shape(self, name: str) -> TensorShape:
        """Returns the shape of the whole tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the artifact's dtype."""
        return self.exits.torch_dtype

    def check_shape(self, name: str, shape: TensorShape) -> None:
        """Raises InputError where the exits have no such tensor, or the backbone tensor to copy has another shape."""
        if self.shapes.get(name) != shape:
            raise InputError(
                f"the exits after layers {self.exits.exit_layers} have no tensor {name} of shape {list(shape)}"
            )
        if (source := self._source(name)) is not None:
            self.reader.check_shape(source, (self.config.vocab_size, *shape[1:]) if self._is_listed(name) else shape)

    def full(self, name: str) -> Tensor:
        """Returns the whole tensor."""
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, …]. Of a copied tensor no other rows are read."""
        self.check_shape(name, self.shapes[name])
        if (source := self._source(name)) is not None:
            values = self._listed_rows[start:stop] if self._is_listed(name) else self.reader.rows(source, start, stop)
            if (fitted := self._folded.get(name)) is not None:
                # So that the result hardly depends on which rows are requested together.
                values = values.double() @ fitted.double()
            return self._cast(source, values)
        return self._drawn(name)[start:stop]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yields the rows of the whole tensor block by block. The tensor is never in memory as a whole."""
        self.check_shape(name, self.shapes[name])
        if self._source(name) is not None or len(self.shapes[name]) == 1:
            return tensor_blocks(self, name)
        return self._drawn_blocks(name)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Returns columns [n, stop - start]. Of a copied tensor no other columns are read."""
        self.check_shape(name, self.shapes[name])
        if name in self._folded or self._is_listed(name):
            return self.full(name)[:, start:stop]
        if (source := self._source(name)) is not None:
            return self._cast(source, self.reader.columns(source, start, stop))
        return self._drawn(name)[:, start:stop]

    def _is_listed(self, name: str) -> bool:
        return bool(self.exits.token_ids) and name.endswith(".output.weight")

    @cached_property
    def _listed_rows(self) -> Tensor:  # [n + 1, h]
        """Returns the listed rows of the backbone's output matrix and, except for a drafting head, one of any other
        token. The same for all exits.
        """
        name = exit_copy_source(f"exits.{self.exits.exit_layers[0]}.output.weight", self.config)
        assert name is not None
        is_listed = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        is_listed[list(self.exits.token_ids)] = True
        parts, others, first = [], torch.zeros(self.config.hidden_size, dtype=torch.float64), 0
        for block in tensor_blocks(self.reader, name):
            own = is_listed[first : first + len(block)]
            parts.append(block[own])
            others += block[~own].double().sum(0)
            first += len(block)
        other = others / (self.config.vocab_size - len(self.exits.token_ids)) if self._other is None else self._other
        listed = torch.cat(parts)
        return listed if self.exits.draft else torch.cat((listed, other[None].to(listed.dtype)))

    def _cast(self, name: str, values: Tensor) -> Tensor:
        """Casts the values of the tensor `name` to the artifact's dtype. Raises InputError where one is not finite in
        it.
        """
        return check_finite(self.exits.model_name, name, values.to(self.exits.torch_dtype))

    def _source(self, name: str) -> str | None:
        """Returns the backbone tensor to copy, or None for a random tensor."""
        return exit_copy_source(name, self.config, self.exits.draft) if self.exits.init != "random" else None

    def _linear(self, layer: int, part: str) -> Tensor:
        """Returns a tensor of an exit's linear map. Without a fit it is the identity."""
        width = self.config.hidden_size
        rank = next(head.linear_rank for head in self.exits.heads if head.layer == layer)
        found = self._maps.get(layer, torch.zeros(width, 2 * rank + 1) if rank else torch.eye(width, width + 1))
        return {
            "bias": found[:, -1],
            "weight": found[:, :-1],
            "up.weight": found[:, :rank],
            "down.weight": found[:, rank:-1].T,
        }[part]

    def _drawn(self, name: str) -> Tensor:
        return torch.cat(list(self._drawn_blocks(name)))

    def _drawn_blocks(self, name: str) -> Iterator[Tensor]:
        """Yields a random tensor in blocks of a multiple of 16 values: torch's generator then gives the same values as
        at once.
        """
        if name.endswith(".weight") and len(self.shapes[name]) == 1:
            yield torch.ones(self.shapes[name], dtype=self.exits.torch_dtype)
            return
        layer, part = int(name.split(".")[1]), name.split(".", 2)[2]
        if part.startswith("linear.") and self.exits.init != "random":
            yield self._cast(name, self._linear(layer, part.removeprefix("linear.")))
            return
        if name.endswith(".bias") or (part == "adapter.up.weight" and self.exits.init != "random"):
            yield torch.zeros(self.shapes[name], dtype=self.exits.torch_dtype)
            return
        std = self.config.init_std / (math.sqrt(2 * layer) if is_residual_projection(name, self.config) else 1.0)
        digest = hashlib.sha256(f"{self.exits.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows, *width = self.shapes[name]
        step = max(16, BLOCK_BYTES // (4 * math.prod(width)) // 16 * 16) if math.prod(width) >= 16 else rows
        for row in range(0, rows, step):
            yield self._cast(name, torch.randn(min(step, rows - row), *width, generator=generator) * std)
