"""Claims about what is computed over a vocabulary shard, one rank and its padding; several ranks are in
tests/distributed.
"""

from types import SimpleNamespace

import pytest
import torch

from ee_tuning.parallel.vocab import VocabShard, gather_logits, log_sum_exp, top1


def _alone(size: int, padded: int) -> VocabShard:
    return VocabShard.of(size, padded, SimpleNamespace(tp=1, tp_rank=0, tp_group=None))


def _logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 3).to(dtype)


def test_shards_cover_the_padded_vocabulary_once_and_know_their_padding() -> None:
    """Five ids in four shards of two rows: the third has one true row, the last has none, not minus one."""
    shards = [VocabShard.of(5, 8, SimpleNamespace(tp=4, tp_rank=rank, tp_group=None)) for rank in range(4)]
    assert [(s.first, s.rows, s.true_rows) for s in shards] == [(0, 2, 2), (2, 2, 2), (4, 2, 1), (6, 2, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top1_is_the_largest_of_the_softmax(dtype: torch.dtype) -> None:
    """A probability taken in the logits' 16 bits would be off by a percent at the threshold."""
    logits = _logits(3, 4, 257, dtype=dtype)
    wide = logits if dtype == torch.float64 else logits.float()
    best = top1(logits, _alone(257, 257))
    assert torch.equal(best.token_ids, wide.argmax(-1))
    assert best.max_probability.dtype == wide.dtype and best.max_probability.shape == (3, 4)
    torch.testing.assert_close(best.max_probability, wide.softmax(-1).amax(-1))


def test_ties_go_to_the_lowest_id() -> None:
    """Greedy tokens would differ from the full model's wherever two logits are equal, as they often are in bf16."""
    logits = torch.zeros(2, 300)
    logits[0, [40, 200, 299]] = 5.0
    assert top1(logits, _alone(300, 300)).token_ids.tolist() == [40, 0]


def test_top1_tells_logits_apart_that_round_to_one_probability() -> None:
    """Choosing among rounded probabilities would give id 0 here."""
    logits = torch.tensor([0.1, 0.1], dtype=torch.float32)
    logits[1] = logits[1].nextafter(torch.tensor(1.0))
    assert logits.softmax(-1)[0] == logits.softmax(-1)[1], "the example no longer shows the hazard"
    assert top1(logits, _alone(2, 2)).token_ids.item() == 1


def test_padding_never_wins_and_never_weighs() -> None:
    """Rows beyond the vocabulary hold whatever initialization left there."""
    shard, logits = _alone(10, 16), _logits(4, 16)
    logits[:, 10:] = 1e4
    best = top1(logits, shard)
    assert torch.equal(best.token_ids, logits[:, :10].argmax(-1))
    torch.testing.assert_close(best.max_probability, logits[:, :10].softmax(-1).amax(-1))
    torch.testing.assert_close(log_sum_exp(logits, shard), logits[:, :10].logsumexp(-1))
    assert torch.equal(gather_logits(logits, shard), logits[:, :10])


def test_log_sum_exp_keeps_float64_and_widens_16_bits() -> None:
    """Sums of thousands of terms in 16 bits lose all digits; float64 tests would prove nothing in float32."""
    shard = _alone(5000, 5000)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = _logits(2, 5000, dtype=dtype)
        assert log_sum_exp(logits, shard).dtype == wide
        torch.testing.assert_close(log_sum_exp(logits, shard), logits.to(wide).exp().sum(-1).log())


def test_a_shape_that_is_not_the_shards_is_refused() -> None:
    """Logits already gathered would be cut by the padding of one shard."""
    with pytest.raises(AssertionError):
        top1(torch.zeros(12), _alone(10, 16))
