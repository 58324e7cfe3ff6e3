"""Claims about the chunked linear cross-entropy on one rank: it is F.cross_entropy of F.linear, at the memory of one
chunk.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ee_tuning.losses.loss import linear_loss, token_losses
from ee_tuning.parallel.vocab import VocabShard

S, B, H, V = 7, 3, 16, 37


def _shard(size: int, padded: int | None = None) -> VocabShard:
    return VocabShard(size, 0, padded or size, None, 1)


def _inputs(dtype: torch.dtype = torch.float64, rows: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, B, H, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(rows, H, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (S, B), generator=draw)
    mask = torch.rand(S, B, generator=draw) * (torch.rand(S, B, generator=draw) > 0.3)
    return hidden, weight, labels, mask


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, weight[:V]).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 20, 21, 1000])
def test_loss_and_gradients_equal_the_materialized_ones(chunk_tokens: int) -> None:
    """A last chunk shorter than the others would read rows of the one before, left in the buffer."""
    inputs = _inputs()
    loss = linear_loss(*inputs, vocab=_shard(V), chunk_tokens=chunk_tokens).loss
    expected = _plain(*inputs)
    assert loss.dtype == torch.float64 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    ours, theirs = torch.autograd.grad(loss * 0.37, inputs[:2]), torch.autograd.grad(expected * 0.37, inputs[:2])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("trains_hidden", "trains_weight"), [(True, False), (False, True)])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(trains_hidden: bool, trains_weight: bool) -> None:
    """A tied head's frozen matrix must cost no gradient of its size, and a head without anything before it none of the
    states.
    """
    hidden, weight, labels, mask = _inputs()
    expected = torch.autograd.grad(_plain(hidden, weight, labels, mask), (hidden, weight))
    hidden.requires_grad_(trains_hidden), weight.requires_grad_(trains_weight)
    linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss.backward()
    for tensor, trains, gradient in ((hidden, trains_hidden, expected[0]), (weight, trains_weight, expected[1])):
        assert (tensor.grad is not None) == trains
        if trains:
            torch.testing.assert_close(tensor.grad, gradient)


def test_padded_rows_weigh_nothing_and_get_no_gradient() -> None:
    """A padded row that shares in the softmax would take probability from every true token."""
    hidden, weight, labels, mask = _inputs(rows=V + 5)
    weight.data[V:] = 1e3
    loss = linear_loss(hidden, weight, labels, mask, vocab=_shard(V, V + 5), chunk_tokens=4).loss
    expected = _plain(hidden, weight, labels, mask)
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    assert not ours[1][V:].any()


def test_masked_tokens_may_have_any_label_and_others_may_not() -> None:
    """-100 at a masked place must not poison the sum; at one that counts it must not pass for a loss."""
    hidden, weight, labels, mask = _inputs()
    expected = torch.autograd.grad(_plain(hidden, weight, labels, mask), (hidden, weight))
    labels[mask == 0] = -100
    loss = linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), expected)
    labels[mask.argmax() // B, mask.argmax() % B] = V
    assert linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss.isnan()


def test_large_logits_do_not_overflow() -> None:
    """exp of a logit that is not reduced by the largest is infinite from 89 on."""
    hidden, weight, labels, mask = _inputs(torch.float32)
    loss = linear_loss(hidden * 100, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss
    torch.testing.assert_close(loss, _plain(hidden * 100, weight, labels, mask))


def test_bf16_is_as_near_to_float64_as_the_plain_loss_in_bf16() -> None:
    """A softmax or a loss computed in bf16 would be several times further away."""
    hidden, weight, labels, mask = _inputs(torch.bfloat16)
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(_plain(*exact_inputs, labels, mask), exact_inputs)
    loss = linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=1).loss
    ours = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.autograd.grad(_plain(hidden, weight, labels, mask), (hidden, weight))
    assert loss.dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), _plain(*exact_inputs, labels, mask), rtol=3e-3, atol=0)
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert (mine.double() - right).norm() <= 1.3 * (theirs.double() - right).norm()


def test_the_weights_gradient_in_bf16_keeps_growing_over_many_chunks() -> None:
    """A bf16 sum stops growing once it is 256 times its terms: hundreds of chunks would count as a few."""
    hidden, weight = (
        torch.ones(1000, 1, H, dtype=torch.bfloat16),
        torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True),
    )
    labels, mask = torch.zeros(1000, 1, dtype=torch.long), torch.ones(1000, 1)
    linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=1).loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0].float(), torch.full((H,), -1000 * (1 - 1 / V)), rtol=5e-3, atol=0)


def test_without_gradient_the_same_loss_and_each_tokens_own() -> None:
    """Validation would report another number than training for the same weights."""
    hidden, weight, labels, mask = _inputs()
    trained = linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss
    with torch.inference_mode():
        assert torch.equal(linear_loss(hidden, weight, labels, mask, vocab=_shard(V), chunk_tokens=4).loss, trained)
        each = token_losses(hidden, weight, labels, vocab=_shard(V), chunk_tokens=4)
    torch.testing.assert_close(
        each, F.cross_entropy((hidden @ weight.T).transpose(1, 2), labels, reduction="none").detach()
    )


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place: a second pass would scale them twice."""
    inputs = _inputs()
    loss = linear_loss(*inputs, vocab=_shard(V), chunk_tokens=4).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


class _LargestTensor(TorchDispatchMode):
    """Records the most elements any operation's result had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype: torch.dtype) -> None:
    """The one promise of chunking: the plain loss makes a tensor of sequence × batch × vocabulary, ours nothing near
    it.
    """
    hidden = torch.randn(64, 4, 8).to(dtype).requires_grad_()
    weight = torch.randn(500, 8).to(dtype).requires_grad_()
    labels, mask = torch.randint(500, (64, 4)), torch.ones(64, 4)
    largest = {}
    for name in ("ours", "plain"):
        with _LargestTensor() as seen:
            if name == "ours":
                linear_loss(hidden, weight, labels, mask, vocab=_shard(500), chunk_tokens=16).loss.backward()
            else:
                F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten()).backward()
        largest[name] = seen.numel
    assert largest == {"ours": 16 * 500, "plain": 256 * 500}
