"""Exits that say a part of the vocabulary: whatever the layout, they learn, and go on, as in one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tuning import assert_same_records
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_samples, records
from world import World

from ee_tuning import config as job
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config, ParallelSection
from ee_tuning.losses.loss import linear_loss
from ee_tuning.losses.objective import Objective
from ee_tuning.losses.teacher import HiddenTeacher, top_k_teacher
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.parallel.shortlist import Shortlist, token_logits, token_top1
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.parallel.vocab import VocabShard, padded_size
from ee_tuning.tuning.tuner import Tuner

LISTED = ListedTokens(token_ids=(0, 3, 5, 20, 21, 22, 24, 49, 60, 100), num_tokens=1, num_listed=1)
"""11 classes, 12 rows; most of the list lies in the first half of the vocabulary."""
MIXTURES: dict[str, dict[str, Any]] = {
    "top_k": {"loss": ("cross_entropy=0.3", "forward_kl=0.7"), "teacher_top_k": 4, "compare_final": True},
    "hidden": {"loss": ("forward_kl", "total_variation=0.5"), "teacher": "hidden", "token_weights": "confidence"},
}
LAYOUTS = {"top_k": [(2, 2, True)], "hidden": [(2, 2, False)]}
"""TP, PP, and whether the sequence is cut over TP."""


def tune_listed(config: Config) -> bool:
    Path(config.tuning.run_folder).mkdir(parents=True, exist_ok=True)
    topology = init_parallel(config.parallel)
    tuner = Tuner(
        load_for_tuning(config, topology, listed=LISTED), make_samples(config.tuning.seq_length), config, topology
    )
    tuner.resume()
    return tuner.run()


@pytest.mark.parametrize("mixture", list(MIXTURES))
def test_every_layout_learns_as_one_process(world: World, model: Path, tmp_path: Path, mixture: str) -> None:
    """A listed token that lies on another rank in the teacher's vocabulary than in the exits'; "any other token"
    counted in each shard.
    """
    wanted = configure(model, tmp_path / "alone", save_interval=2, **MIXTURES[mixture])
    assert tune_listed(wanted)
    for tp, pp, cuts_sequence in LAYOUTS[mixture]:
        config = configure(model, tmp_path / f"run{tp}{pp}", tp=tp, pp=pp, save_interval=2, **MIXTURES[mixture])
        config = job.replace(config, parallel={"sequence_parallel": cuts_sequence})
        assert world.run(tune_listed, config) == [True] * 4
        assert_same_records(records(config), records(wanted))
        got, expected = checkpoint(config, NUM_STEPS), checkpoint(wanted, NUM_STEPS)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-8, msg=name)


def said_on_shards(tp: int, token_ids: tuple[int, ...], vocab_size: int) -> dict[str, Any]:
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp))
    return said(
        Shortlist.of_tokens(token_ids, VocabShard.of(vocab_size, padded_size(vocab_size, tp), topology), topology)
    )


def said(vocab: Shortlist) -> dict[str, Any]:
    """Of the same inputs in every layout."""
    draw, h = torch.Generator().manual_seed(3), 8
    hidden, teaching = torch.randn(2, 5, 3, h, generator=draw, dtype=torch.float64)
    weight, frozen = (
        torch.randn(size, h, generator=draw, dtype=torch.float64) for size in (vocab.size, vocab.whole.size)
    )
    labels, mask = torch.randint(vocab.whole.size, (5, 3), generator=draw), torch.rand(5, 3, generator=draw)

    def own(full: torch.Tensor, shard: VocabShard) -> torch.Tensor:
        padding = full.new_full((shard.rows * shard.world_size - shard.size, h), 50.0)
        return torch.cat((full, padding))[shard.first : shard.first + shard.rows]

    weight, frozen = own(weight, vocab), own(frozen, vocab.whole)
    teachers = (HiddenTeacher(teaching, frozen), top_k_teacher(teaching, frozen, 2, vocab=vocab, chunk_tokens=4))
    logits = hidden @ weight.T
    got: dict[str, Any] = {"losses": [], "logits": token_logits(logits, vocab), "top": list(token_top1(logits, vocab))}
    for teacher in teachers:
        inputs = hidden.clone().requires_grad_()
        objective = Objective(cross_entropy=0.3, forward_kl=0.5, total_variation=0.4, weighs_by_confidence=True)
        arguments: dict[str, Any] = {"vocab": vocab, "chunk_tokens": 4, "objective": objective, "teacher": teacher}
        linear_loss(inputs, weight, labels, mask, **arguments).loss.backward()
        got["losses"] += [inputs.grad, *linear_loss(hidden, weight, labels, mask, **arguments)]
    return got


@pytest.mark.parametrize(
    ("tp", "token_ids", "vocab_size"), [(4, (0, 1, 2), 37), (4, (30, 36), 37), (2, tuple(range(0, 37, 3)), 38)]
)
def test_shards_say_what_one_says(world: World, tp: int, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """A list that lies on one rank, a rank with padding alone, "any other token" on a rank of its own."""
    whole = VocabShard(vocab_size, 0, vocab_size, None, 1)
    alone = SimpleNamespace(tp=1, tp_rank=0, tp_group=None, device=torch.device("cpu"))
    wanted = said(Shortlist.of_tokens(token_ids, whole, alone))
    for got in world.run(said_on_shards, tp, token_ids, vocab_size):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
