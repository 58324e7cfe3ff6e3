"""A vocabulary in two and four shards: loss, gradients, top-1, log-sum-exp and gathered logits are those of one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from world import World

from ee_tuning.config import ParallelSection
from ee_tuning.losses.loss import linear_loss, token_losses
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.parallel.vocab import VocabShard, gather_logits, log_sum_exp, top1

S, B, H = 5, 3, 8
# 5 ids in 4 shards of 2 rows leave the last shard nothing but padding.
LAYOUTS = [(2, 37, 38), (4, 37, 40), (2, 64, 64), (4, 5, 8)]


def _shard(tp: int, vocab_size: int, padded: int) -> VocabShard:
    return VocabShard.of(vocab_size, padded, init_parallel(ParallelSection(tensor_model_parallel_size=tp)))


def _rows(full: Tensor, shard: VocabShard) -> Tensor:
    return full[..., shard.first : shard.first + shard.rows]


def loss_and_gradients(
    shard: VocabShard, padded: int, dtype: torch.dtype, trains_weight: bool = True
) -> dict[str, Any]:
    """Of the same inputs in every layout; a padded row holds large numbers, which must not matter."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, B, H, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    full = torch.randn(shard.size, H, generator=draw, dtype=torch.float64).to(dtype)
    full = torch.cat((full, full.new_full((padded - shard.size, H), 50.0)))
    weight = full[shard.first : shard.first + shard.rows].clone().requires_grad_(trains_weight)
    labels, mask = torch.randint(shard.size, (S, B), generator=draw), torch.rand(S, B, generator=draw)
    loss = linear_loss(hidden, weight, labels, mask, vocab=shard, chunk_tokens=4).loss
    (loss * 0.5).backward()
    each = token_losses(hidden, weight, labels, vocab=shard, chunk_tokens=4)
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "each": each,
        "shard": (shard.first, shard.rows),
    }


def loss_on_shards(tp: int, vocab_size: int, padded: int, dtype: torch.dtype, trains_weight: bool) -> dict[str, Any]:
    return loss_and_gradients(_shard(tp, vocab_size, padded), padded, dtype, trains_weight)


@pytest.mark.parametrize(("tp", "vocab_size", "padded"), LAYOUTS)
def test_loss_and_gradients_are_those_of_one_shard(world: World, tp: int, vocab_size: int, padded: int) -> None:
    """A hidden gradient not summed over the shards trains what lies before the head on a part of the vocabulary."""
    alone = loss_and_gradients(VocabShard(vocab_size, 0, padded, None, 1), padded, torch.float64)
    for got in world.run(loss_on_shards, tp, vocab_size, padded, torch.float64, True):
        first, rows = got["shard"]
        for key, expected in (
            ("loss", alone["loss"]),
            ("hidden", alone["hidden"]),
            ("each", alone["each"]),
            ("weight", alone["weight"][first : first + rows]),
        ):
            torch.testing.assert_close(got[key], expected, rtol=1e-12, atol=1e-14)


def test_in_bf16_and_with_a_frozen_weight_ranks_still_agree_to_the_bit(world: World) -> None:
    """Replicated parameters that get gradients differing in the last bit drift apart over a run."""
    alone = loss_and_gradients(VocabShard(37, 0, 40, None, 1), 40, torch.bfloat16)
    results = world.run(loss_on_shards, 4, 37, 40, torch.bfloat16, False)
    for got in results:
        assert got["weight"] is None
        assert torch.equal(got["loss"], results[0]["loss"]) and torch.equal(got["hidden"], results[0]["hidden"])
        torch.testing.assert_close(got["loss"], alone["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(got["hidden"], alone["hidden"], rtol=0.03, atol=0.03)


def _full_logits(vocab_size: int, padded: int, dtype: torch.dtype) -> Tensor:
    """[2, 6, padded]: random rows, rows of one value throughout, and rows whose largest stands in the first and the
    last id.
    """
    logits = torch.randn(2, 6, padded, generator=torch.Generator().manual_seed(9)).mul(3).to(dtype)
    logits[:, 3] = 0.25
    logits[:, 4, [vocab_size - 1, 0]] = 20.0
    logits[:, 5, [vocab_size - 1, vocab_size // 2]] = 20.0
    logits[..., vocab_size:] = 1e4
    return logits


def answers_on_shards(tp: int, vocab_size: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shard = _shard(tp, vocab_size, padded)
    logits = _rows(_full_logits(vocab_size, padded, dtype), shard)
    return *top1(logits, shard), log_sum_exp(logits, shard), gather_logits(logits, shard), *top1(logits[0, 4], shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("tp", "vocab_size", "padded"), LAYOUTS)
def test_top1_sums_and_gathered_logits_are_those_of_one_shard(
    world: World, tp: int, vocab_size: int, padded: int, dtype: torch.dtype
) -> None:
    """A tie across shards that goes to the higher id changes greedy text with the layout."""
    alone, logits = VocabShard(vocab_size, 0, padded, None, 1), _full_logits(vocab_size, padded, dtype)
    expected = (
        *top1(logits, alone),
        log_sum_exp(logits, alone),
        gather_logits(logits, alone),
        *top1(logits[0, 4], alone),
    )
    assert expected[0][0, 3:].tolist() == [0, 0, vocab_size // 2]
    results = world.run(answers_on_shards, tp, vocab_size, padded, dtype)
    for got in results:
        for mine, theirs, first_ranks in zip(got, expected, results[0], strict=True):
            torch.testing.assert_close(mine, theirs)
            assert torch.equal(mine, first_ranks), "ranks disagree"
