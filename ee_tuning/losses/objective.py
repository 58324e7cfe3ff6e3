"""The training objective of an exit."""

from dataclasses import dataclass

THRESHOLDS = (0.9, 0.8, 0.6)
"""Confidences whose shares of tokens are reported."""
LK_RATE = 3.0
"""Rate at which the hybrid LK loss moves from KL to total variation; the best one in the paper."""


@dataclass(frozen=True)
class Objective:
    """Weights of the four terms of a token's loss, with p the exit's distribution and t its teacher's."""

    cross_entropy: float = 1.0
    """-log p(label)."""
    forward_kl: float = 0.0
    """Σ t log(t / p)."""
    total_variation: float = 0.0
    """½ Σ |t - p|, whose complement is the share of drafts that speculative sampling accepts (arXiv 2211.17192, section
    3.5).
    """
    lk: float = 0.0
    """λ · forward_kl + (1 - λ) · total_variation with λ = exp(-LK_RATE · (1 - total_variation)), held constant for each
    token: the hybrid LK loss (arXiv 2602.23881), whose gradient is KL's where few drafts would be accepted.
    """
    weighs_by_confidence: bool = False
    """Whether a token's loss is multiplied by its largest probability, held constant: the dynamic weights of EE-Tuning
    (arXiv 2402.00518).
    """

    @property
    def wants_teacher(self) -> bool:
        """Whether the loss needs the teacher's distribution t."""
        return self.forward_kl > 0 or self.total_variation > 0 or self.lk > 0
