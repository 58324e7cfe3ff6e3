"""`ee-tuning profile`: measures how far each layer turns the hidden states of a text, and places exits by it.

The angular distance of two layers' inputs is that of arXiv 2403.17887: arccos of their cosine, over π, averaged over
all tokens here. One layer is in memory at a time (`layer_stream.py`).
"""

import argparse
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from ee_tuning.artifact.stage_plans import compute_dtype
from ee_tuning.checkpoint.formats import check_model, model_folder, open_model
from ee_tuning.config import Config, ParallelSection, replace
from ee_tuning.config.placement import AutoLayers, evenly_along
from ee_tuning.errors import InputError
from ee_tuning.evaluation.layer_stream import LayerStream, angular_distances, text_ids
from ee_tuning.json_file import to_json
from ee_tuning.parallel.collectives import run_with_heartbeat
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel, world_size
from ee_tuning.storage.apart import check_beside
from ee_tuning.storage.atomic_write import check_file

# b samples · s tokens of a sample · h hidden

NUM_SAMPLES = 8


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
    if not config.exits.is_placed_by_profile:
        return config
    wanted = config.exits.exit_layers
    assert isinstance(wanted, AutoLayers)
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


def _by_layers(config: Config, topology: Topology) -> Generator[None, None, Profile]:
    reader, model, _ = open_model(config.model)
    with reader:
        check_model(reader, model, None, verifies=False)
        ids = text_ids(config, model, NUM_SAMPLES)
        stream = LayerStream(reader, model, topology, compute_dtype(config, topology), ids.shape[1])
        states = [stream.embedded(ids)]  # [s, b, h]
        for number in range(1, model.num_layers + 1):
            states.append(stream.layer(number)(states[-1]))
            yield
        return Profile(angular_distances(states), ids.numel())


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
