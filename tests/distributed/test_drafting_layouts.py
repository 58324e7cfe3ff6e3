"""A drafting head learns, goes on and is judged the same whatever the layout: the states that it reads come from other
stages.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tuning import assert_same_records
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_samples, records
from world import World

from ee_tuning import config as job
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.tuner import Tuner

LISTED = ListedTokens(token_ids=(0, 3, 5, 20, 21, 22, 24, 49, *range(60, 101, 2)), num_tokens=1, num_listed=1)
"""Most of the list lies in the second half of the vocabulary."""
LAYOUTS = {
    "whole": [(2, 1, False, 0), (2, 2, True, 0), (1, 4, False, 0), (2, 2, True, 4)],
    "listed": [(2, 2, False, 0)],
}
"""TP, PP, whether the sequence is cut over TP, the tokens of its chunks; the rest of four processes are replicas."""


def draft_job(model: Path, run: Path, tp: int = 1, pp: int = 1, cuts: bool = False, **tuning: Any) -> Config:
    """Layers 1, 3 and 5 are read, 1 and 3 of them on stages before the head's; 5 is the last of a stage of two."""
    settings = {"loss": ("lk", "forward_kl=0.2"), "ttt_step_loss_decay": 0.8, "compare_final": True, "save_interval": 2}
    config = configure(model, run, tp=tp, pp=pp, exits=(), **{**settings, **tuning})
    return job.replace(
        config,
        exits={"architecture": ("eagle3",), "aux_layers": (1, 3, 5)},
        parallel={"sequence_parallel": cuts},
    )


def tune_drafts(config: Config, listed: ListedTokens | None = None) -> bool:
    Path(config.tuning.run_folder).mkdir(parents=True, exist_ok=True)
    topology = init_parallel(config.parallel)
    loaded = load_for_tuning(config, topology, listed=listed)
    tuner = Tuner(loaded, make_samples(config.tuning.seq_length), config, topology)
    tuner.resume()
    return tuner.run()


@pytest.mark.parametrize("vocabulary", list(LAYOUTS))
def test_every_layout_learns_as_one_process(world: World, model: Path, tmp_path: Path, vocabulary: str) -> None:
    """States of a layer that arrive as another's, a gradient that is a shard's share, a step that another rank's tokens
    are shifted into; a listed token whose row of the output matrix lies on another rank.
    """
    listed, wanted = LISTED if vocabulary == "listed" else None, draft_job(model, tmp_path / "alone")
    assert tune_drafts(wanted, listed)
    expected = checkpoint(wanted, NUM_STEPS)
    assert "exits.6.midlayer.self_attn.q_proj.weight.exp_avg" in expected
    for tp, pp, cuts, chunk in LAYOUTS[vocabulary]:
        config = draft_job(model, tmp_path / f"run{tp}{pp}{chunk}", tp, pp, cuts, forward_chunk_length=chunk)
        assert world.run(tune_drafts, config, listed) == [True] * 4
        assert_same_records(records(config), records(wanted))
        for one, other in zip(records(config), records(wanted), strict=True):
            for key in ("mean_acceptance_length", "acceptance_rate_1", "acceptance_rate_3"):
                assert one.get(key, {}) == pytest.approx(other.get(key, {}), rel=1e-9)
        got = checkpoint(config, NUM_STEPS)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-8, msg=name)


def test_a_resumed_run_is_the_run_never_stopped(world: World, model: Path, tmp_path: Path) -> None:
    """A moment or a master that a checkpoint of a drafting head leaves out."""
    whole = draft_job(model, tmp_path / "whole", 2, 2, dtype="float32")
    assert world.run(tune_drafts, whole) == [True] * 4
    stopped = draft_job(model, tmp_path / "stopped", 2, 2, dtype="float32")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped/checkpoints/latest").write_text("step_00000002\n")
    assert world.run(tune_drafts, stopped) == [True] * 4
    got, wanted = checkpoint(stopped, NUM_STEPS), checkpoint(whole, NUM_STEPS)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert records(stopped) == records(whole)
