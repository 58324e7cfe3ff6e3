"""Exit policies of requests, checked against the model's exits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ee_tuning.config import GenerationSection
from ee_tuning.config.generation import Measure
from ee_tuning.errors import InputError
from ee_tuning.sampling.calibration import read_calibration


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The exit policy of one request; by default no token leaves early, as in the full model."""

    thresholds: Mapping[int, float] = field(default_factory=dict)
    """Exits that are asked -> confidence from which on a token leaves there."""
    measure: Measure = "max_probability"
    """The measure of confidence."""
    fixed_exit: int | None = None
    """The exit at which every token leaves, prompt tokens included: deeper layers never run."""
    drafts_at: tuple[int, ...] = ()
    """Exits that may draft tokens, which the full model checks."""
    looks_up: bool = False
    """Whether repeated text drafts tokens, too (`prompt_lookup.py`)."""
    has_draft_head: bool = False
    """Whether the model's drafting head drafts tokens, which the full model checks."""

    @property
    def asked(self) -> frozenset[int]:
        """Exits whose heads the policy may ask."""
        return frozenset(
            {*self.thresholds, *self.drafts_at} | ({self.fixed_exit} if self.fixed_exit is not None else set())
        )


FULL = Policy()


def policy_of(
    generation: GenerationSection,
    exit_layers: tuple[int, ...],
    num_layers: int,
    heads_digest: str | None = None,
    *,
    has_draft_head: bool = False,
) -> Policy:
    """Returns the policy that the keys describe, for a model with these exits. Raises InputError where it needs an exit
    or a head that does not exist.
    """
    if generation.budget is not None:
        raise InputError(
            "generation.budget is measured when a model is loaded, and can not be an option of one request; give exit_layer"
        )
    kind = generation.policy
    if kind == "full":
        return FULL
    if has_draft_head:
        if kind != "speculative":
            raise InputError(
                f"policy {kind} needs exits, and the artifact holds a drafting head, at which no token leaves; use --policy "
                "speculative, or --policy full"
            )
        return Policy(has_draft_head=True, looks_up=generation.prompt_lookup)
    known = ", ".join(map(str, exit_layers)) or "none, give --exits"
    if kind == "fixed":
        if generation.exit_layer not in exit_layers:
            raise InputError(
                f"policy fixed needs --exit-layer, one of the exits ({known}), got {generation.exit_layer}"
            )
        return Policy(fixed_exit=generation.exit_layer)
    if not exit_layers:
        raise InputError(f"policy {kind} needs exit heads, got none; give --exits FOLDER, or --policy full")
    # An exit after the last layer is no early exit.
    early = tuple(layer for layer in exit_layers if layer < num_layers)
    if kind == "speculative":
        return Policy(drafts_at=early, looks_up=generation.prompt_lookup)
    if generation.calibration is not None:
        calibration = read_calibration(generation.calibration, exit_layers, num_layers, heads_digest)
        return Policy(thresholds=calibration.used, measure=calibration.measure)
    thresholds = _thresholds(generation.threshold, exit_layers)
    # No measure exceeds 1.
    return Policy(
        thresholds={layer: thresholds[layer] for layer in early if thresholds[layer] <= 1}, measure=generation.measure
    )


def _thresholds(given: tuple[float, ...], exit_layers: tuple[int, ...]) -> dict[int, float]:
    if len(given) not in (1, len(exit_layers)):
        raise InputError(
            f"--threshold must be one number, or one for each of the {len(exit_layers)} exits "
            f"({', '.join(map(str, exit_layers))}), got {len(given)}"
        )
    if not all(value >= 0 for value in given):
        raise InputError(
            f"--threshold must be at least 0, got {', '.join(f'{v:g}' for v in given)}; 1.1 never exits, 0.8 is a good start"
        )
    return dict(zip(exit_layers, given * (len(exit_layers) if len(given) == 1 else 1), strict=True))
