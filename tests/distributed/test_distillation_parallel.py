"""Every mixture of losses over a vocabulary in shards is that of one, with either kind of teacher."""

from typing import Any

import pytest
import torch
from test_vocab_parallel import LAYOUTS, B, H, S, _rows, _shard
from world import World

from ee_tuning.losses.loss import linear_loss
from ee_tuning.losses.objective import Objective
from ee_tuning.losses.teacher import HiddenTeacher, Teacher, top_k_teacher
from ee_tuning.parallel.vocab import VocabShard

MIXTURES = [
    Objective(cross_entropy=0.3, forward_kl=0.5),
    Objective(cross_entropy=0, total_variation=1),
    Objective(cross_entropy=0.3, forward_kl=0.5, total_variation=0.4, weighs_by_confidence=True),
]


def losses(shard: VocabShard, padded: int) -> dict[str, Any]:
    """Of the same inputs in every layout, for each mixture and teacher; a padded row holds large numbers, which must
    not matter.
    """
    draw = torch.Generator().manual_seed(3)
    hidden, teaching = torch.randn(2, S, B, H, generator=draw, dtype=torch.float64)
    full = torch.randn(2, shard.size, H, generator=draw, dtype=torch.float64)
    full = torch.cat((full, full.new_full((2, padded - shard.size, H), 50.0)), 1).mT  # tokens last, for _rows
    weight, frozen = _rows(full, shard).mT.contiguous()
    labels, mask = torch.randint(shard.size, (S, B), generator=draw), torch.rand(S, B, generator=draw)
    teachers: dict[str, Teacher] = {
        "hidden": HiddenTeacher(teaching, frozen),
        "top_k": top_k_teacher(teaching, frozen, 3, vocab=shard, chunk_tokens=4),
    }
    got: dict[str, Any] = {"shard": (shard.first, shard.rows)}
    for name, teacher in teachers.items():
        for index, objective in enumerate(MIXTURES):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            arguments: dict[str, Any] = {"vocab": shard, "chunk_tokens": 4, "objective": objective, "teacher": teacher}
            loss = linear_loss(*inputs, labels, mask, **arguments).loss
            loss.backward()
            with torch.no_grad():
                statistics = linear_loss(*inputs, labels, mask, **arguments).statistics
            got[f"{name} {index}"] = (loss.detach(), statistics, inputs[0].grad, inputs[1].grad)
    return got


def losses_on_shards(tp: int, vocab_size: int, padded: int) -> dict[str, Any]:
    return losses(_shard(tp, vocab_size, padded), padded)


@pytest.mark.parametrize(("tp", "vocab_size", "padded"), LAYOUTS)
def test_mixtures_over_shards_are_those_of_one(world: World, tp: int, vocab_size: int, padded: int) -> None:
    """Confidence of a shard in place of the vocabulary's, as in the reference; a teacher's token counted in two
    shards.
    """
    alone = losses(VocabShard(vocab_size, 0, padded, None, 1), padded)
    for got in world.run(losses_on_shards, tp, vocab_size, padded):
        first, rows = got.pop("shard")
        assert got.keys() == alone.keys() - {"shard"}
        for name, (loss, statistics, of_hidden, of_weight) in got.items():
            wanted = alone[name]
            torch.testing.assert_close((loss, statistics, of_hidden), wanted[:3], rtol=1e-11, atol=1e-13, msg=name)
            torch.testing.assert_close(of_weight, wanted[3][first : first + rows], rtol=1e-11, atol=1e-13, msg=name)
