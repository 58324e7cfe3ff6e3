"""`ee-tuning profile`: measures how far each layer turns the hidden states of a text, and places exits by it.

The angular distance of two layers' inputs is that of arXiv 2403.17887: arccos of their cosine, over π, averaged over
all tokens here. Layers are built, read and dropped one after the other, so that a model of any size needs the memory of
one layer.
"""

import argparse
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.artifact.stage_plans import compute_dtype
from ee_tuning.checkpoint.formats import BackboneSource, check_model, model_folder, open_model
from ee_tuning.checkpoint.huggingface import read_backbone_tensor
from ee_tuning.config import Config, ParallelSection, replace
from ee_tuning.config.placement import AutoLayers, evenly_along
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model.backbone import BackboneStage
from ee_tuning.model.config import ModelConfig
from ee_tuning.parallel.heartbeat import run_with_heartbeat
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel, world_size
from ee_tuning.storage.apart import check_beside
from ee_tuning.storage.atomic_write import check_file
from ee_tuning.storage.non_finite import no_numbers, num_non_finite

# b samples · s tokens of a sample · h hidden

NUM_SAMPLES, SAMPLE_LENGTH = 8, 128


@dataclass(frozen=True)
class Profile:
    """Angular distances of a text's hidden states."""

    distances: Tensor
    """[layers + 1, layers + 1] float64: angular distance between the inputs of two layers. The last row is the last
    layer's output.
    """
    num_tokens: int

    @property
    def angular_distances(self) -> list[float]:
        """The angle by which each layer turns its input, from 0 to 1 (opposite)."""
        return self.distances.diagonal(1).tolist()

    @property
    def path(self) -> list[float]:
        """The length of the path up to each layer's output: its angles, summed."""
        return self.distances.diagonal(1).cumsum(0).tolist()

    def exit_layers(self, num_exits: int) -> tuple[int, ...]:
        """Places exits with about the same angle between them. Raises InputError where there are too few layers."""
        return evenly_along(self.path, num_exits)


def with_exit_layers(config: Config) -> Config:
    """Replaces auto:N:profile in `config` by layers. All ranks call it, and one measures.

    Raises InputError where the model or the text can not be used.
    """
    wanted = config.exits.exit_layers
    if config.exits.path is not None or not isinstance(wanted, AutoLayers) or not wanted.by_profile:
        return config
    topology = init_parallel(ParallelSection())
    layers = measure_profile(config, topology).exit_layers(wanted.num_exits)
    if topology.is_logging_rank:
        print(f"exits after layers {', '.join(map(str, layers))}, by the profile")
    return replace(config, exits={"exit_layers": layers})


def measure_profile(config: Config, topology: Topology) -> Profile:
    """Runs exits.profile_text through the model, on rank 0. All ranks call it. Raises InputError where either can not
    be used.
    """
    found: list[Profile] = []

    def look() -> Iterator[None]:
        found.append((yield from _by_layers(config, topology)))

    run_with_heartbeat(look() if topology.rank == 0 else iter(()), topology)
    return topology.broadcast_object(found)[0]


@torch.no_grad()
def _by_layers(config: Config, topology: Topology) -> Generator[None, None, Profile]:
    reader, model, _ = open_model(config.model)
    with reader:
        check_model(reader, model, None, verifies=False)
        ids = _sample_ids(config, model)
        dtype = compute_dtype(config, topology)
        states = [torch.empty(0)]
        for number in range(1, model.num_layers + 1):
            stage = _one_layer(number, reader, model, topology, dtype, ids.shape[1])
            if number == 1:
                states = [stage.embed(ids.to(topology.device))]  # [s, b, h]
            states.append(stage.run_layer(number, states[-1]))
            if num_non_finite(states[-1]):
                raise no_numbers(f"the hidden states behind layer {number}", dtype)
            yield
        return Profile(_distances(states), ids.numel())


def profile(config: Config, flags: argparse.Namespace) -> None:
    """Prints a line per layer and the places of `flags.num_exits` exits, as a table or JSON, and draws them to
    `flags.output`.
    """
    from ee_tuning.evaluation.profile_picture import draw_profile

    if flags.num_exits < 1:
        raise InputError(f"--num-exits must be at least 1, got {flags.num_exits}")
    if world_size() > 1:
        raise InputError(f"profile is for one process, got {world_size()}; start it without torchrun")
    check_file(flags.output)
    check_beside(flags.output, config, (config.exits.profile_text,))
    measured = measure_profile(config, init_parallel(ParallelSection()))  # a world of one, for any layout of the job
    destroy_parallel()
    layers = measured.exit_layers(flags.num_exits)
    draw_profile(measured.distances, layers, model_folder(config.model.path).name, flags.output)
    whole = measured.path[-1]
    if flags.json:
        print(
            to_json(
                {
                    "tokens": measured.num_tokens,
                    "turns": measured.angular_distances,
                    "distances": measured.distances.tolist(),
                    "exit_layers": layers,
                    "picture": str(flags.output),
                }
            )
        )
        return
    print("layer  turns its input by  share of the way done")
    for number, (turn, done) in enumerate(zip(measured.angular_distances, measured.path, strict=True), 1):
        print(f"{number:5}  {turn:18.4f}  {done / whole:20.1%}" + "  exit" * (number in layers))
    print(f"angular distances, 1 is opposite, mean over {measured.num_tokens:,} tokens; wrote {flags.output}")
    print(f"as auto:{flags.num_exits}:profile has it: --exit-layers {','.join(map(str, layers))}")


def _one_layer(
    number: int, reader: BackboneSource, model: ModelConfig, topology: Topology, dtype: torch.dtype, length: int
) -> BackboneStage:
    stage = BackboneStage(
        model,
        topology,
        first_layer=number,
        last_layer=number,
        has_embedding=number == 1,
        has_output=False,
        has_final_norm=False,
        max_length=length,
        dtype=dtype,
    )
    read = partial(read_backbone_tensor, reader, model, tp=1, tp_rank=0, dtype=dtype)
    for name, parameter in stage.named_parameters():
        parameter.copy_(read(name))
    return stage


def _sample_ids(config: Config, model: ModelConfig) -> Tensor:  # [b, s] int64
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    path = Path(config.exits.profile_text or argparse.__file__)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"exits.profile_text (--text) must be a text file; {path} can not be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise InputError(
            f"exits.profile_text (--text) must be a text file in UTF-8, got {path}: {error}; unpack it where it is packed, "
            "else convert it (iconv -t utf-8)"
        ) from error
    length = min(SAMPLE_LENGTH, model.max_position_embeddings)
    ids = torch.tensor(tokenizer(text)["input_ids"][: NUM_SAMPLES * length])
    if len(ids) < length:
        raise InputError(
            f"exits.profile_text must have at least {length} tokens, and {path} has {len(ids)}; give a longer one"
        )
    if int(ids.max()) >= model.vocab_size:
        raise InputError(
            f"the tokenizer makes token {int(ids.max())}, and the model's vocabulary ends at {model.vocab_size - 1}; "
            "give its own --tokenizer"
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _distances(states: list[Tensor]) -> Tensor:  # [layers + 1] of [s, b, h] -> [layers + 1, layers + 1]
    unit = [torch.nn.functional.normalize(each.flatten(0, 1).float(), dim=-1) for each in states]
    found = torch.zeros(len(unit), len(unit), dtype=torch.float64)
    for i, one in enumerate(unit):
        for j in range(i):
            cosine = (one * unit[j]).sum(-1).clamp(-1, 1)
            found[i, j] = found[j, i] = (cosine.arccos() / math.pi).double().mean()
    return found
