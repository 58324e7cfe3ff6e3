"""Claims about the chunked loss with a teacher and with token weights: it is the plain formula over all logits, at the
memory of chunks.
"""

import pytest
import torch
import torch.nn.functional as F
from plain_loss import PADDED, B, H, LossInputs, S, V, check_chunked, named_events, plain_objective
from torch import Tensor

from ee_tuning.losses.loss import linear_loss
from ee_tuning.losses.objective import Objective
from ee_tuning.losses.teacher import HiddenTeacher, TopKTeacher, top_k_teacher
from ee_tuning.parallel.vocab import VocabShard

SHARD = VocabShard(V, 0, PADDED, None, 1)
MIXTURES = [
    Objective(),
    Objective(cross_entropy=0, forward_kl=1),
    Objective(cross_entropy=0, total_variation=1),
    Objective(cross_entropy=0.3, forward_kl=0.5),
    Objective(cross_entropy=0.7, total_variation=1.5),
    Objective(cross_entropy=0.2, forward_kl=0.5, total_variation=0.4, weighs_by_confidence=True),
    Objective(weighs_by_confidence=True),
]


class Inputs(LossInputs):
    """Of the student and its teacher, seeded."""

    vocab = SHARD

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = randn(S, B, H).requires_grad_(), randn(PADDED, H).requires_grad_()
        self.teacher_hidden, self.teacher_weight = randn(S, B, H) / 2, randn(PADDED, H)
        self.draw_labels(draw)


def plain(inputs: Inputs, kind: str, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective and its parts, by way of all logits and autograd."""
    logits = F.linear(inputs.hidden, inputs.weight[:V]).flatten(0, 1)
    p = logits.softmax(-1)
    t = F.linear(inputs.teacher_hidden, inputs.teacher_weight[:V]).flatten(0, 1).softmax(-1)
    events = (p, t) if kind == "hidden" else named_events(t.argsort(descending=True)[:, : int(kind)], p, t)
    return plain_objective(
        objective,
        logits,
        inputs.labels.flatten(),
        inputs.mask.flatten(),
        events,
        confidence=p.amax(-1),
        agreement=(p.argmax(-1) == t.argmax(-1)).double(),
        **{"above_0.6": (p.amax(-1) >= 0.6).double()},
    )


@pytest.mark.parametrize("kind", ["hidden", "1", "5", "36"])
@pytest.mark.parametrize("objective", MIXTURES, ids=str)
def test_every_mixture_equals_the_materialized_one(objective: Objective, kind: str) -> None:
    """A term missing from the gradient trains to something else; a weight that is not held constant is trained
    along.
    """
    inputs = Inputs()
    check_chunked(inputs, kind, objective, *plain(inputs, kind, objective))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    """Noise in place of a zero divergence would train an exit away from where it should be."""
    inputs = Inputs(torch.float32)
    teacher = HiddenTeacher(inputs.hidden.detach(), inputs.weight.detach())
    for objective in (Objective(cross_entropy=0, forward_kl=1), Objective(cross_entropy=0, total_variation=1)):
        loss = linear_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            inputs.mask,
            vocab=SHARD,
            chunk_tokens=4,
            objective=objective,
            teacher=teacher,
        ).loss
        (gradient,) = torch.autograd.grad(loss, inputs.hidden)
        assert abs(loss.item()) < 1e-5 and gradient.abs().max() < 1e-5


def test_a_teacher_told_whole_is_the_teacher() -> None:
    """A tail that keeps mass, or a token counted in it and beside it."""
    inputs = Inputs()
    objective = Objective(cross_entropy=0, forward_kl=1, total_variation=1)
    for k in (str(V), str(V + 10)):  # a k above the vocabulary is the vocabulary
        torch.testing.assert_close(
            inputs.loss(k, objective).loss, inputs.loss("hidden", objective).loss, rtol=1e-9, atol=0
        )


def test_of_equal_tokens_the_teacher_names_the_lowest_first() -> None:
    """In bf16 logits tie often: agreement would count as a difference what argmax calls the same."""
    hidden, weight = torch.ones(1, 1, 1), torch.tensor([1.0, 3, 2, 3, 3, 0])[:, None]
    teacher = top_k_teacher(hidden, weight, 4, vocab=VocabShard(6, 0, 6, None, 1), chunk_tokens=1)
    assert teacher.ids.tolist() == [[1, 3, 4, 2]]
    assert (teacher.probabilities.sum(-1, keepdim=True) + teacher.tail).item() == pytest.approx(1)


def test_masked_tokens_may_have_any_label_also_with_a_teacher() -> None:
    """-100 at a masked place must poison neither the sums nor the gradient."""
    inputs, objective = Inputs(), MIXTURES[5]
    wanted = torch.autograd.grad(inputs.loss("5", objective).loss, (inputs.hidden, inputs.weight))
    inputs.labels[inputs.mask == 0] = -100
    got = inputs.loss("5", objective)
    assert torch.isfinite(got.statistics).all()
    torch.testing.assert_close(torch.autograd.grad(got.loss, (inputs.hidden, inputs.weight)), wanted)


def test_bf16_students_and_teachers_stay_near_float64() -> None:
    """A softmax taken in bf16 would be far off; the bound is that of the logits' rounding."""
    inputs, objective = Inputs(torch.bfloat16), MIXTURES[5]
    exact = Inputs(torch.bfloat16)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(exact, name, getattr(inputs, name).detach().double().requires_grad_())
    for kind in ("hidden", "5"):
        got, wanted = inputs.loss(kind, objective), plain(exact, kind, objective)[0]
        assert got.loss.dtype == torch.float32
        torch.testing.assert_close(got.loss.double(), wanted, rtol=1e-2, atol=0)
        (gradient,) = torch.autograd.grad(got.loss, inputs.hidden)
        (expected,) = torch.autograd.grad(wanted, exact.hidden)
        assert (gradient.double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("k", [0, 3])
def test_told_tokens_are_the_likeliest(k: int) -> None:
    """A chunk's rows that land in another one's, or probabilities of another token."""
    inputs = Inputs()
    teacher = inputs.teacher(str(k or V))
    assert isinstance(teacher, TopKTeacher)
    whole = F.linear(inputs.teacher_hidden, inputs.teacher_weight[:V]).flatten(0, 1).softmax(-1)
    values, ids = whole.topk(k or V)
    assert torch.equal(teacher.ids, ids)
    torch.testing.assert_close(teacher.probabilities, values)
