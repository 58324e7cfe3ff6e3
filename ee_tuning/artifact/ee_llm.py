"""Exits of an EE-LLM checkpoint: a legacy Megatron checkpoint with exit norms, exit MLPs (`mlp.branch`), transformer
layers (`exit_block`) and output matrices.

The saved arguments are interpreted as EE-LLM's code does: with `pre_exit`, exit n reads the input of layer n, so it
sits after layer n − 1, and its exit MLP never runs. The exit temperature divides logits in EE-LLM's loss only, never in
decoding: it is mentioned, and no weight is scaled.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_names import exit_parameter_names, exit_shard
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.checkpoint.legacy import LegacyReader
from ee_tuning.checkpoint.names import embedding_name, merge_shards
from ee_tuning.config import Architecture
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.torch_file import StoredTensor


class EELLMExits:
    """The exits in a legacy checkpoint.

    Raises InputError where there are none, or no head of this project can represent them.
    """

    def __init__(self, reader: LegacyReader, config: ModelConfig, model_name: str):
        self.reader, self.config = reader, config
        arguments = reader.checkpoint.arguments or {}
        numbers = arguments.get("exit_layer_nums")
        if not isinstance(numbers, list | tuple) or not numbers or not all(type(number) is int for number in numbers):
            raise InputError(
                f"{reader.folder} holds no exits (its saved exit_layer_nums is {numbers!r}); give layers for new ones: "
                "--exit-layers 8,16"
            )
        is_before = bool(arguments.get("pre_exit"))
        self._numbers = {number - is_before: (index, number) for index, number in enumerate(sorted(numbers))}
        config.check_exit_layers(tuple(self._numbers))
        dtype = reader.dtype(embedding_name(config))
        self.exits = ExitHeadsConfig(
            exit_layers=tuple(self._numbers),
            architecture=(self._architecture(arguments),) * len(self._numbers),
            output="untied" if arguments.get("untie_exit_output_weights") else "tied",
            dtype=str(dtype).removeprefix("torch."),
            model_name=model_name,
            model_shape=model_shape(config),
            model_fingerprint=fingerprint(reader, config),
            init="ee_llm",
            tuned={
                "by": "EE-LLM",
                "exit_layer_nums": list(numbers),
                "pre_exit": is_before,
                **_plain(arguments, "exit_layer_temperature"),
                **_plain(arguments, "exit_layer_weight"),
            },
        )
        if self.exits.ties_output and not config.ties_embeddings:
            raise InputError(
                f"{reader.folder}: its exits have no output matrices of their own, and nor do its embeddings serve as one"
            )

    def tensors(self, layers: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
        """Yields the artifact's whole tensors of the exits after `layers`."""
        for head in (each for each in self.exits.heads if each.layer in layers):
            index, number = self._numbers[head.layer]
            prefix = f"decoder.layers.{number - 1}."
            for parameter in exit_parameter_names(head, self.config):
                if parameter == "output.weight":
                    yield f"exits.{head.layer}.output.weight", self._output(f"exit_output_layer.{index}.weight")
                    continue
                part, _, rest = parameter.partition(".")
                key = prefix + {"norm": "exit_norm.", "mlp": "mlp.branch.linear_", "layer": "exit_block."}[part] + rest
                shards = self._read(key)
                plans = [exit_shard(head, parameter, self.config, len(shards), rank) for rank in range(len(shards))]
                for plan, shard in zip(plans, shards, strict=True):
                    self._check(tuple(shard.shape) == plan.shape, key, plan.shape)
                yield from merge_shards(plans, shards).items()

    def _output(self, key: str) -> Tensor:
        whole, size = torch.cat(self._read(key)), self.config.vocab_size
        self._check(len(whole) >= size, key, (size, self.config.hidden_size))
        return whole[:size]

    def _architecture(self, arguments: dict[str, Any]) -> Architecture:
        """Returns the architecture. EE-LLM runs an exit's MLP (on the layer's attention output, so not with pre_exit),
        then a layer, then a norm, if it has them.
        """
        parts = (
            bool(arguments.get("use_exit_mlp")) and not arguments.get("pre_exit"),
            bool(arguments.get("use_exit_block")),
            bool(arguments.get("use_exit_norm")),
        )
        architectures: dict[tuple[bool, bool, bool], Architecture] = {
            (True, False, True): "mlp",
            (False, True, True): "layer",
            (False, False, True): "norm",
            (False, False, False): "embedding",
        }
        if parts not in architectures:
            found = ", ".join(
                f"{key} = {bool(arguments.get(key))}" for key in ("use_exit_mlp", "use_exit_block", "use_exit_norm")
            )
            raise InputError(
                f"{self.reader.folder}: its exits have {found}, which no architecture here represents; give layers for new ones: "
                "--exit-layers 8,16"
            )
        return architectures[parts]

    def _read(self, key: str) -> list[Tensor]:
        """Returns the shards of all ranks."""
        shards: list[StoredTensor] = []
        for table in self.reader.checkpoint.tables:
            if key not in table:
                raise InputError(
                    f"{self.reader.folder} must hold {key}, as its saved arguments say, and does not; fetch the whole folder"
                )
            table[key].check()
            shards.append(table[key])
        return [shard.mapped().clone() for shard in shards]

    def _check(self, holds: bool, key: str, shape: tuple[int, ...]) -> None:
        if not holds:
            raise InputError(
                f"{self.reader.folder}: {key} must have shape {list(shape)}, as its saved arguments say; fetch it again"
            )


def _plain(arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns a list of numbers from the arguments, or an empty one."""
    value = arguments.get(key)
    is_plain = isinstance(value, list) and all(isinstance(number, int | float) for number in value)
    return {key: value} if is_plain else {}
