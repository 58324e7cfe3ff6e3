"""Tokens chosen by two heads: an exit's logits are taken from the final head's, or mixed with them.

Contrast is DoLa (Chuang et al. 2023, arXiv 2309.03883): the difference that deeper layers make to a token's
log-probability, among the tokens that the final head finds likely. Mixture is a weighted mean of both heads'
log-probabilities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_tuning.config import GenerationSection
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.sampling.policy import Policy

# v vocabulary · e exits

_UNLIKELY = 1000.0
"""Decrease of the log-probability of a token that the final head finds unlikely. Its probability becomes zero; but
where a form or `min_tokens` forbids all other tokens, such tokens keep the final head's order.
"""


@dataclass(frozen=True, kw_only=True)
class ExitFusion:
    """The change of the final head's logits by those of exits, where the final head is asked."""

    contrast_layers: tuple[int, ...] = ()
    """Exits that the final head is contrasted with. Of several, the one whose distribution differs most at the token,
    by Jensen-Shannon divergence.
    """
    contrast_alpha: float = 0.1
    """Share of the likeliest token's probability that the final head has to give a token for it to be chosen."""
    fuse_layer: int | None = None
    """The exit whose log-probabilities are mixed with the final head's."""
    fuse_weight: float = 0.5
    """The weight of that exit; the final head has the rest."""

    @classmethod
    def of(cls, generation: GenerationSection) -> "ExitFusion":
        """Returns the fusion that the section's keys describe."""
        return cls(**{name: getattr(generation, name) for name in cls.__dataclass_fields__})

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits whose logits it needs."""
        return self.contrast_layers or (() if self.fuse_layer is None else (self.fuse_layer,))

    def check(self, exits: tuple[ExitSpec, ...], policy: Policy) -> None:
        """Raises InputError on values that can not be used, on exits that do not exist or can not be compared with the
        final head, and on a policy that never asks the final head.
        """
        if self.contrast_layers and self.fuse_layer is not None:
            raise InputError(
                f"contrast_layers and fuse_layer exclude each other, got {list(self.contrast_layers)} and {self.fuse_layer}; "
                "give one of them"
            )
        for name, share in (("contrast_alpha", self.contrast_alpha), ("fuse_weight", self.fuse_weight)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise InputError(f"{name} must be in 0..1, got {share!r}")
        if not self.layers:
            return
        name = "contrast_layers" if self.contrast_layers else "fuse_layer"
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"{name} must name each exit once, got {list(self.layers)}; leave one of them out")
        for layer in self.layers:
            _check_exit(name, layer, exits)
        if policy.fixed_exit is not None:
            raise InputError(
                f"{name} needs the final head, which the policy fixed never asks; use the policy full, threshold or "
                "speculative"
            )


def check_one_head(generation: GenerationSection) -> None:
    """Raises InputError where a job that compares policies with the full model asks for two heads."""
    if ExitFusion.of(generation).layers:
        raise InputError(
            "evaluate compares policies with the full model's own head, and contrast_layers and fuse_layer change what it says; "
            "leave them out"
        )


def _check_exit(name: str, layer: int, exits: tuple[ExitSpec, ...]) -> None:
    known = {each.layer: each for each in exits if each.draft is None}
    if layer not in known:
        raise InputError(f"{name} must name exits ({', '.join(map(str, known)) or 'none, give --exits'}), got {layer}")
    if known[layer].output_vocab:
        raise InputError(
            f"{name} needs an exit for the whole vocabulary, and the one after layer {layer} has a shortlist of "
            f"{known[layer].output_vocab} tokens; convert exits without --output-vocab"
        )
    if known[layer].architecture == "layer":
        raise InputError(
            f"{name} needs an exit without a layer of its own, and the one after layer {layer} is of architecture layer; "
            "use one of another architecture"
        )


def fused_logits(
    final: Tensor,  # [v]
    exits: Tensor,  # [e, v], in the order of `fusion.layers`
    fusion: ExitFusion,
) -> Tensor:  # [v], at least float32
    """Returns the logits that a token is chosen by, instead of the final head's."""
    final, exits = (each.to(torch.promote_types(each.dtype, torch.float32)).log_softmax(-1) for each in (final, exits))
    if fusion.fuse_layer is not None:
        return (1 - fusion.fuse_weight) * final + fusion.fuse_weight * exits[0]
    base = exits[int(jensen_shannon(final, exits).argmax())]
    least = final.max() + (math.log(fusion.contrast_alpha) if fusion.contrast_alpha else -math.inf)
    return torch.where(final >= least, final - base, final - _UNLIKELY)


def jensen_shannon(final: Tensor, exits: Tensor) -> Tensor:  # [v], [e, v], log-probabilities -> [e]
    """Returns the Jensen-Shannon divergence between the final head's distribution and each exit's, in nats."""
    middle = torch.logaddexp(final, exits) - math.log(2)
    return ((final.exp() * (final - middle)).sum(-1) + (exits.exp() * (exits - middle)).sum(-1)) / 2
