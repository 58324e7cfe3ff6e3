"""What a drafting head is trained and judged by, against plain loops over tokens and steps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.losses.drafting import Drafting, Targets, draft_metrics
from ee_tuning.losses.loss import STATISTICS, linear_loss
from ee_tuning.losses.objective import LK_RATE, Objective
from ee_tuning.losses.teacher import HiddenTeacher
from ee_tuning.parallel.draft_vocab import draft_vocab
from ee_tuning.parallel.vocab import VocabShard

S, B, H, V, K, DECAY = 9, 2, 5, 13, 3, 0.5
ALONE: Any = SimpleNamespace(tp=1, tp_rank=0, tp_group=None, device=torch.device("cpu"))
LISTED = (0, 2, 3, 7, 8, 12)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Case:
    """A text of two rows, what the model says along it, and a drafter's states for each step."""

    def __init__(self, listed: tuple[int, ...] = ()) -> None:
        torch.manual_seed(3)
        self.labels, self.mask = torch.randint(0, V, (S, B)), torch.ones(S, B, dtype=torch.float64)
        self.mask[2, 0] = 0.0
        self.ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
        self.final, self.matrix, self.drafted = numbers(S, B, H), numbers(V, H), numbers(S, K, B, H)
        self.own = numbers(len(listed) or V, H)
        self.listed = listed or tuple(range(V))
        self.vocab = draft_vocab(listed, VocabShard.of(V, V, ALONE), ALONE)
        model: Any = SimpleNamespace(
            exit_vocab=self.vocab, backbone=SimpleNamespace(output_layer=SimpleNamespace(weight=self.matrix))
        )
        self.drafting = Drafting(model, K, DECAY)
        self.told = Targets(self.labels, self.mask, HiddenTeacher(self.final, self.matrix))

    def loss(self, hidden: Tensor, objective: Objective, chunk: int) -> Any:
        targets = self.drafting.targets(self.told, self.ids)
        return linear_loss(
            hidden.flatten(1, 2),
            self.own,
            targets.labels,
            targets.loss_mask,
            vocab=self.vocab,
            chunk_tokens=chunk,
            objective=objective,
            teacher=targets.teacher,
        )

    def counts(self, t: int, k: int, b: int) -> bool:
        """Whether step k of the draft behind token t is one that could be said in decoding."""
        place = t + 1 + k
        return place < S and bool(self.mask[t : place + 1, b].all()) and self.ids[b, t] == self.ids[b, place]


@pytest.mark.parametrize("listed", [(), LISTED], ids=["whole", "listed"])
@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_each_step_learns_from_the_final_head_at_its_own_place(listed: tuple[int, ...], chunk: int) -> None:
    """A step that is compared with the token before or after; a chunk that begins within a draft; decay that counts
    twice.
    """
    case = Case(listed)
    hidden = case.drafted.clone().requires_grad_()
    got = case.loss(hidden, Objective(cross_entropy=0.0, forward_kl=1.0, total_variation=0.5, lk=0.25), chunk)
    plain, total = case.drafted.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for t in range(S):
        for k in range(K):
            for b in range(B):
                place = t + 1 + k
                if not case.counts(t, k, b) or case.labels[place, b] not in case.listed:
                    continue
                p = (case.matrix[list(case.listed)] @ case.final[place, b]).softmax(0)
                q = (case.own @ plain[t, k, b]).log_softmax(0)
                kl, variation = (p * (p.log() - q)).sum(), (p - q.exp()).abs().sum() / 2
                share = math.exp(-LK_RATE * (1 - float(variation.detach())))
                lk = share * kl + (1 - share) * variation
                total = total + DECAY**k * (kl + 0.5 * variation + 0.25 * lk)
    torch.testing.assert_close(got.loss, total)
    got.loss.backward()
    total.backward()
    torch.testing.assert_close(hidden.grad, plain.grad)


@pytest.mark.parametrize("listed", [(), LISTED], ids=["whole", "listed"])
def test_acceptance_is_that_of_rounds_against_the_whole_vocabulary(listed: tuple[int, ...]) -> None:
    """A later step that counts though an earlier one was wrong; a round that begins within another; a token that can
    not be drafted and is yet accepted.
    """
    case = Case(listed)
    with torch.no_grad():  # most drafts are what the model says, where it can be said
        for t in range(S):
            for k in range(K):
                for b in range(B):
                    said = int((case.matrix @ case.final[min(t + 1 + k, S - 1), b]).argmax())
                    if said in case.listed and (t + k + b) % 4:
                        case.drafted[t, k, b] = 50 * case.own[case.listed.index(said)]
        made = case.loss(case.drafted, Objective(cross_entropy=0.0, forward_kl=1.0), 7)
    counts = case.drafting.accepted(made.agreement, case.told, case.ids)
    counted, accepted = [0.0] * K, [0.0] * K
    for b in range(B):
        t = 0
        while t < S:
            run, is_held = 0, True
            for k in range(K):
                if case.counts(t, k, b):
                    said = (case.matrix @ case.final[t + 1 + k, b]).argmax()
                    drafted = case.listed[int((case.own @ case.drafted[t, k, b]).argmax())]
                    is_held = is_held and bool(said == drafted)
                    counted[k] += 1
                    accepted[k] += is_held
                    run += is_held
            t += run + 1
    assert counts.tolist() == [*counted, *accepted] and sum(accepted) > 3
    figures = draft_metrics(counts.tolist())
    assert figures["acceptance_rate_2"] == accepted[1] / counted[1]
    rates = [part / whole for part, whole in zip(accepted, counted, strict=True)]
    assert figures["mean_acceptance_length"] == 1 + sum(rates)


def test_the_hybrid_loss_is_kl_where_no_draft_would_be_accepted_and_total_variation_where_all_would() -> None:
    """A weight that is not held constant, or that goes the wrong way."""
    for scale, kind in ((0.0, "forward_kl"), (1.0, "total_variation")):
        torch.manual_seed(0)
        matrix, final = torch.eye(4, dtype=torch.float64) * 30, F.one_hot(torch.tensor([[1]]), 4).double()
        hidden = (scale * final + (1 - scale) * final.roll(1, -1)).requires_grad_()
        teacher, vocab = HiddenTeacher(final, matrix), VocabShard.of(4, 4, ALONE)
        labels, mask = torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64)
        keys: Any = {"vocab": vocab, "chunk_tokens": 4, "teacher": teacher}
        made = linear_loss(hidden, matrix, labels, mask, objective=Objective(cross_entropy=0, lk=1.0), **keys)
        value = made.statistics[STATISTICS.index(kind)]
        share = math.exp(-LK_RATE * scale) if kind == "forward_kl" else 1 - math.exp(-LK_RATE)
        torch.testing.assert_close(made.loss, share * value, rtol=1e-6, atol=1e-9)
