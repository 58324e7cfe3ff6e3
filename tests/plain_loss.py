"""An exit's objective by way of all logits and autograd, against the chunked one. Of the latter nothing is used here
but the call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.losses.loss import STATISTICS, ExitLoss, linear_loss
from ee_tuning.losses.objective import Objective
from ee_tuning.losses.teacher import HiddenTeacher, Teacher, top_k_teacher
from ee_tuning.parallel.shortlist import Shortlist
from ee_tuning.parallel.vocab import VocabShard

# n tokens · c classes · k classes that the teacher names

S, B, H, V, PADDED = 7, 3, 16, 37, 42


class LossInputs:
    """A student and its teacher; `draw_labels` draws labels and mask."""

    vocab: VocabShard | Shortlist
    hidden: Tensor  # [S, B, H]
    weight: Tensor
    teacher_hidden: Tensor  # [S, B, H]
    teacher_weight: Tensor  # [PADDED, H]

    def draw_labels(self, draw: torch.Generator) -> None:
        self.labels = torch.randint(V, (S, B), generator=draw)
        self.mask = torch.rand(S, B, generator=draw, dtype=torch.float64) * (torch.rand(S, B, generator=draw) > 0.3)

    def teacher(self, kind: str) -> Teacher:
        """`hidden`, or the number of tokens that it names."""
        if kind == "hidden":
            return HiddenTeacher(self.teacher_hidden, self.teacher_weight)
        return top_k_teacher(self.teacher_hidden, self.teacher_weight, int(kind), vocab=self.vocab, chunk_tokens=5)

    def loss(self, kind: str, objective: Objective, chunk_tokens: int = 4) -> ExitLoss:
        return linear_loss(
            self.hidden,
            self.weight,
            self.labels,
            self.mask,
            vocab=self.vocab,
            chunk_tokens=chunk_tokens,
            objective=objective,
            teacher=self.teacher(kind),
        )


def named_events(told: Tensor, *distributions: Tensor) -> tuple[Tensor, ...]:  # [n, k], [n, c] each -> [n, k + 1] each
    """Distributions over the classes `told` and one event for all others."""
    return tuple(
        torch.cat((each.gather(1, told), 1 - each.gather(1, told).sum(1, keepdim=True)), 1) for each in distributions
    )


def plain_objective(
    objective: Objective,
    logits: Tensor,  # [n, c]
    labels: Tensor,  # [n]
    mask: Tensor,  # [n]
    events: tuple[Tensor, ...],  # the student's, the teacher's
    **statistics: Tensor,  # [n] each
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective, and the sums of its parts and of `statistics`."""
    of_student, of_teacher = events
    parts = {
        "cross_entropy": F.cross_entropy(logits, labels, reduction="none"),
        "forward_kl": F.kl_div(of_student.log(), of_teacher, reduction="none").sum(-1),
        "total_variation": (of_student - of_teacher).abs().sum(-1) / 2,
    }
    weights = mask * logits.softmax(-1).amax(-1).detach() if objective.weighs_by_confidence else mask
    per_token = sum(getattr(objective, name) * each for name, each in parts.items())
    sums = {name: (mask * each).sum() for name, each in {**parts, **statistics}.items()}
    return (weights * per_token).sum(), {**sums, "tokens": mask.sum(), "weights": weights.sum()}


def check_chunked(
    inputs: LossInputs, kind: str, objective: Objective, expected: Tensor, sums: dict[str, Tensor]
) -> None:
    """Loss, gradients and statistics of the chunked loss are those of the plain one."""
    wanted = torch.autograd.grad(expected * 0.37, (inputs.hidden, inputs.weight))
    for chunk_tokens in (4, 1000):
        got = inputs.loss(kind, objective, chunk_tokens)
        torch.testing.assert_close(got.loss, expected, rtol=1e-10, atol=0)
        gradients = torch.autograd.grad(got.loss * 0.37, (inputs.hidden, inputs.weight))
        torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        evaluated = inputs.loss(kind, objective)
    torch.testing.assert_close(evaluated.loss, expected.detach(), rtol=1e-10, atol=0)
    statistics = dict(zip(STATISTICS, evaluated.statistics, strict=True))
    for name, value in sums.items():
        torch.testing.assert_close(statistics[name], value.detach(), rtol=1e-9, atol=1e-12, msg=name)
