"""Claims about exits that say a part of the vocabulary: losses, statistics and confidence are those of the coarsened
distributions.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plain_loss import PADDED, B, H, LossInputs, S, V, check_chunked, named_events, plain_objective
from torch import Tensor

from ee_tuning.losses.objective import Objective
from ee_tuning.losses.teacher import TopKTeacher, top_k_teacher
from ee_tuning.parallel.shortlist import (
    UNSURE,
    Shortlist,
    token_confidences,
    token_likeliest,
    token_log_probabilities,
    token_logits,
    token_top1,
)
from ee_tuning.parallel.vocab import VocabShard

ALONE = SimpleNamespace(tp=1, tp_rank=0, tp_group=None, device=torch.device("cpu"))
IDS = (0, 3, 4, 11, 17, 18, 29, 36)
VOCAB = Shortlist.of_tokens(IDS, VocabShard(V, 0, PADDED, None, 1), ALONE)
OTHER = len(IDS)
MIXTURES = [
    Objective(),
    Objective(cross_entropy=0, forward_kl=1),
    Objective(cross_entropy=0, total_variation=1),
    Objective(cross_entropy=0.2, forward_kl=0.5, total_variation=0.4, weighs_by_confidence=True),
]


class Inputs(LossInputs):
    """Of the student and its teacher, seeded; who agree here and there."""

    vocab = VOCAB

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.hidden, self.weight = randn(S, B, H).requires_grad_(), randn(OTHER + 1, H).requires_grad_()
        self.teacher_hidden, self.teacher_weight = self.hidden.detach() + randn(S, B, H) / 3, randn(PADDED, H)
        self.teacher_weight[list(IDS)] = self.weight.detach()[:-1]
        self.draw_labels(draw)


def coarse(whole: Tensor) -> Tensor:  # [n, v] probabilities -> [n, classes]
    listed = whole[:, list(IDS)]
    return torch.cat((listed, 1 - listed.sum(-1, keepdim=True)), 1)


def plain(inputs: Inputs, kind: str, objective: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective and its parts, by way of all logits, a loop over labels, and autograd."""
    logits = F.linear(inputs.hidden, inputs.weight).flatten(0, 1)
    p, whole = logits.softmax(-1), F.linear(inputs.teacher_hidden, inputs.teacher_weight[:V]).flatten(0, 1).softmax(-1)
    t, named = coarse(whole), [IDS.index(token) if token in IDS else OTHER for token in whole.argmax(-1).tolist()]
    labels = torch.tensor([IDS.index(token) if token in IDS else OTHER for token in inputs.labels.flatten().tolist()])
    events = (p, t)
    if kind != "hidden":  # k + 1 events, the likeliest token's class among the k
        ranks = t.scatter(1, torch.tensor(named)[:, None], 2.0)
        events = named_events(ranks.argsort(descending=True)[:, : int(kind)], p, t)
    says = p.argmax(-1)
    sure = torch.where(says == OTHER, 0.0, p.amax(-1))
    return plain_objective(
        objective,
        logits,
        labels,
        inputs.mask.flatten(),
        events,
        confidence=sure,
        agreement=((says == torch.tensor(named)) & (says != OTHER)).double(),
        **{"above_0.6": (sure >= 0.6).double()},
    )


@pytest.mark.parametrize("kind", ["hidden", "1", "2", "5"])
@pytest.mark.parametrize("objective", MIXTURES, ids=str)
def test_losses_and_statistics_are_those_of_the_coarsened_distributions(objective: Objective, kind: str) -> None:
    """A label that is not listed left out, a teacher's mass that goes nowhere, an exit that agrees by saying "any other
    token".
    """
    inputs = Inputs()
    expected, sums = plain(inputs, kind, objective)
    check_chunked(inputs, kind, objective, expected, sums)
    assert 0 < sums["agreement"] < sums["tokens"] and sums["confidence"] > 0


def test_labels_that_are_no_tokens_stay_so() -> None:
    """-100 at a masked place counted as any other token is harmless, one past the vocabulary that counts would pass for
    a loss.
    """
    inputs = Inputs()
    expected = inputs.loss("hidden", Objective()).loss
    inputs.labels[inputs.mask == 0] = -100
    torch.testing.assert_close(inputs.loss("hidden", Objective()).loss, expected)
    inputs.labels[inputs.mask.argmax() // B, inputs.mask.argmax() % B] = V
    assert inputs.loss("hidden", Objective()).loss.isnan()


def test_the_likeliest_token_is_told_first_however_likely_the_others_are_together() -> None:
    """Agreement by the likeliest class would hold that the teacher says "any other token", which is no token."""
    hidden, weight = torch.eye(3)[:, None], torch.full((3, PADDED), 2.0)
    weight[0, 11], weight[1, 12], weight[2, 11] = 3.0, 9.0, 9.0
    teacher = top_k_teacher(hidden, weight.T.contiguous(), 2, vocab=VOCAB, chunk_tokens=2)
    assert (
        isinstance(teacher, TopKTeacher) and teacher.ids[:, 0].tolist() == [3, OTHER, 3] and teacher.ids[0, 1] == OTHER
    )
    assert teacher.probabilities[0, 1] > teacher.probabilities[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_heads_say_listed_tokens_and_are_sure_of_none_where_another_is_likelier(dtype: torch.dtype) -> None:
    """A class taken for a token id; a token that leaves where it is most likely another one."""
    logits = torch.randn(200, OTHER + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    p = logits.double().softmax(-1)
    ids, confidence = token_top1(logits, VOCAB)
    assert ids.tolist() == [IDS[each] for each in logits[:, :-1].double().argmax(-1)]
    is_other = logits[:, -1] > logits[:, :-1].amax(-1)
    assert 0 < is_other.sum() < 100 and (confidence[is_other] == UNSURE).all()
    torch.testing.assert_close(confidence[~is_other].double(), p.amax(-1)[~is_other], rtol=1e-5, atol=0)
    top = p.topk(2)[0]
    entropy = 1 + (p * p.log()).sum(-1) / torch.tensor(float(OTHER + 1), dtype=torch.float64).log()
    for measure, wanted in (("max_probability", p.amax(-1)), ("margin", top[:, 0] - top[:, 1]), ("entropy", entropy)):
        got = token_confidences(logits, VOCAB, measure).double()
        torch.testing.assert_close(got, torch.where(is_other, UNSURE, wanted), rtol=1e-4, atol=1e-6)
    whole = token_logits(logits, VOCAB)
    assert (
        whole.shape == (200, V)
        and torch.equal(whole[:, list(IDS)], logits[:, :-1])
        and whole.isneginf().sum() == 200 * (V - OTHER)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_tokens_have_the_log_probabilities_that_they_have_alone(dtype: torch.dtype) -> None:
    """A token that is the likeliest, but not by its own log-probability: harnesses compare both for equality."""
    logits = torch.randn(50, OTHER + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    ids, logprobs = token_likeliest(logits, VOCAB, OTHER + 1)
    assert (ids[:, 0] == token_top1(logits, VOCAB).token_ids).all() and logprobs[:, -1].isneginf().all()
    for place in range(OTHER):
        assert torch.equal(logprobs[:, place], token_log_probabilities(logits, ids[:, place], VOCAB))


def test_a_head_that_is_no_number_stays_none() -> None:
    """NaN hidden as an exit that is merely unsure would be decoded with."""
    assert token_top1(torch.full((1, OTHER + 1), torch.nan), VOCAB).max_probability.isnan()
