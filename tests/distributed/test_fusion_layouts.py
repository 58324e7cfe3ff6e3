"""Every layout TP × PP chooses by two heads what one process chooses."""

import pytest
from decoding import FixedDrafts, policy_for, run_all
from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.params import SamplingParams

PROMPTS = [[41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]
FUSIONS = (
    ExitFusion(contrast_layers=(2, 4)),
    ExitFusion(fuse_layer=2, fuse_weight=0.6),
)
WAYS = ({"policy": "full"}, {"threshold": 0.4}, {"policy": "speculative"})


def tokens_at(model: str, exits: str, tp: int, pp: int) -> list[list[int]]:
    """What each prompt is continued by, by each policy and fusion."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    keys = {"model.path": model, "exits.path": exits, "model.dtype": "float64"}
    loaded = load_for_generation(load_config(None, keys), topology)
    said = []
    for way in WAYS:
        engine = Engine(loaded.model, loaded.stages, num_slots=4, max_length=64, max_pending=4, prefill_chunk=6)
        engine.proposer.speculation = FixedDrafts(engine, {2: 0.1, 4: 0.5})
        policy = policy_for(loaded.model, **way)
        sequences = [
            engine.add_request(prompt, SamplingParams(max_tokens=8, fusion=fusion, temperature=warmth, seed=1), policy)[
                0
            ]
            for fusion in FUSIONS
            for warmth in (0.0, 0.8)
            for prompt in PROMPTS
        ]
        run_all(engine)
        said += [sequence.output for sequence in sequences]
    return said


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 4)])
def test_layouts_choose_the_same(world, tmp_path, tp, pp):
    """Logits of one shard; an exit on an earlier stage whose logits stay there; drafts whose logits come late."""
    random_llama(tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", init="copy")
    wanted = tokens_at(str(tmp_path / "model"), str(exits), 1, 1)
    for said in world.run(tokens_at, str(tmp_path / "model"), str(exits), tp, pp):
        assert said == wanted
