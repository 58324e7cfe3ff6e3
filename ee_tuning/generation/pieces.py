"""How decoding cuts the network: a segment ends at an exit, and again where a pipeline stage ends."""
from dataclasses import dataclass

from ee_tuning.config import GenerationSection
from ee_tuning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive layers on one stage without an exit in between."""

    first_layer: int
    last_layer: int
    stage: int
    exit_layer: int | None
    """The exit at its end; the number of layers at the very end, for the final head; None where only a stage ends."""


def cut_pieces(stages: list[tuple[int, int]], exit_layers: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces of a model whose stage p holds layers stages[p], first and last, 1-based."""
    num_layers = stages[-1][1]
    pieces = []
    for stage, (first, last) in enumerate(stages):
        ends = sorted({layer for layer in exit_layers if first <= layer < last} | {last})
        for start, end in zip([first, *(e + 1 for e in ends[:-1])], ends, strict=True):
            named = end in exit_layers or end == num_layers
            pieces.append(Piece(first_layer=start, last_layer=end, stage=stage, exit_layer=end if named else None))
    return tuple(pieces)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a token may leave."""

    consulted: frozenset[int]
    """Exits whose confidence is asked for."""
    threshold: float
    """A token leaves at the first consulted exit that is at least so confident."""
    fixed_exit: int | None = None
    """Every token leaves here, those of the prompt too: deeper layers never run."""


def policy_of(generation: GenerationSection, exit_layers: tuple[int, ...], num_layers: int) -> Policy:
    """The policy that the keys describe. Raises InputError where it asks for an exit that is not there."""
    if generation.policy == "full":
        return Policy(consulted=frozenset(), threshold=float("inf"))
    if generation.policy == "fixed":
        wanted = generation.exit_layer
        if wanted not in exit_layers:
            known = ", ".join(map(str, exit_layers)) or "none, give --exits"
            raise InputError(f"policy fixed needs --exit-layer, one of the exits ({known}), got {wanted}")
        return Policy(consulted=frozenset(), threshold=float("inf"), fixed_exit=wanted)
    if not exit_layers:
        raise InputError("policy threshold needs exit heads, got none; give --exits FOLDER, or --policy full")
    if generation.threshold < 0:
        raise InputError(f"--threshold must be at least 0, got {generation.threshold}; 1.1 never exits, 0.8 is a good start")
    # No probability is above 1, and a layer that is the last one anyway is no way to leave early.
    useful = frozenset() if generation.threshold > 1 else frozenset(exit_layers) - {num_layers}
    return Policy(consulted=useful, threshold=generation.threshold)
