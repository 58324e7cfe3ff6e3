"""On a CUDA device: attention by its kernels is attention, and decoding by graphs says what decoding without them
says.
"""

import json
from pathlib import Path

import pytest
from random_models import random_llama
from test_main_path import pytestmark as needs_gpu
from test_main_path import run

pytestmark = needs_gpu

ATTEND = """
import json, random
import torch
from ee_tuning.decoding.eager_attention import SlotMapping, LayerCache, eager_batch
from ee_tuning.decoding.captured_attention import BEST_FIRST
from ee_tuning.decoding.captured_batch import CapturedBatch

torch.manual_seed(0)
found, rng = [], random.Random(0)
tables = tuple(torch.ones(512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
blocks = [list(range(0, 30)), list(range(40, 60)), list(range(64, 90))]
for groups, per_group in ((8, 1), (2, 4)):
    cache = LayerCache(**{name: torch.randn(101 * 16, groups, 64, device="cuda", dtype=torch.bfloat16) for name in ("keys", "values")})
    for way in [way for way in BEST_FIRST if way.is_there(tables[0])]:
        for starts, lengths in (([300], [1]), ([0, 310, 17], [1, 1, 1]), ([5, 200, 411], [3, 1, 4])):
            rows = [SlotMapping(index=torch.tensor([b * 16 + i for b in own for i in range(16)]), first=own[0] * 16)
                    for own in blocks[:len(starts)]]
            count = 8
            captured = CapturedBatch(count, way(512), tables, 4, spare_block=100)
            captured.load(rows, starts, lengths, object())
            plain = eager_batch(rows, starts, lengths, *tables, queries_per_group=per_group, num_places=1600)
            total = sum(lengths)
            query = torch.randn(count, groups, per_group, 64, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(captured.places[:total], plain.places), (captured.places, plain.places)
            one, other = captured.attend(query, cache, 0.125)[:total], plain.attend(query[:total], cache, 0.125)
            found.append([way.__name__, (one - other).abs().max().item(), other.abs().max().item()])
print(json.dumps(found))
"""

DECODE = """
import json, os, sys
from pathlib import Path
import torch
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.parallel.topology import init_parallel
from decoding import policy_for, run_all
from exits import write_exits

model, folder, dtype, switch = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ["EE_TUNING_GRAPHS"] = switch
replays = []
replay = torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: (replays.append(graph), replay(graph))[1]
exits = write_exits(model, folder / "exits", init="copy")
config = load_config(None, {"model.path": str(model), "exits.path": str(exits), "model.dtype": dtype})
loaded = load_for_generation(config, init_parallel(ParallelSection()))
beginning = [(7 * i + 3) % 101 for i in range(20)]
prompts = [[5, 17, 80, 3, 9], [*beginning, 41], [*beginning, 7, 90, 12]]
answers = {}
policies = {"full": {"policy": "full"}, "fixed": {"policy": "fixed", "exit_layer": 4}, "threshold": {"threshold": [0.3, 0.6]},
            "speculative": {"policy": "speculative"}}
for name, policy in [(name, policies[name]) for name in sys.argv[5:] or policies]:
    for asked in (prompts[:1], prompts):
        engine = Engine(loaded.model, loaded.stages, num_slots=len(asked), max_length=112, max_pending=4, prefill_chunk=8)
        wanted = policy_for(loaded.model, **policy)
        sequences = [engine.add_request(prompt, SamplingParams(max_tokens=40, ignore_eos=True), wanted)[0] for prompt in asked]
        steps = run_all(engine)
        # What speculation drafts hangs on the clock.
        answers[f"{name} {len(asked)}"] = [[[s.token_id, 0 if name == "speculative" else s.exit_layer] for s in steps if s.sequence is each]
                                           for each in sequences]
print(json.dumps({"replays": len(replays), "answers": answers}))
"""


def test_every_way_to_attend_says_the_same() -> None:
    """A kernel that reads a row's end from what was meant for another's beginning, or heads of a group in another
    order.
    """
    found = json.loads(run(ATTEND, on_gpu=True))
    assert {name for name, _, _ in found} >= {"GatheredAttention", "VarlenAttention"}
    for name, apart, size in found:
        assert apart <= 0.02 * size, (name, apart, size)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("width", [10, 16])
def test_graphs_say_what_kernels_one_by_one_say(tmp_path: Path, dtype: str, width: int) -> None:
    """A graph that reads what was there when it was recorded, a state that the next replay overwrites, kernels that
    were never recorded.

    Heads 10 wide keep to attention that takes any width; those of 16 have FlashAttention in bfloat16.
    """
    random_llama(tmp_path / "model", confident=True, head_dim=width)
    said = {}
    for switch in ("1", "0"):
        (tmp_path / switch).mkdir()
        said[switch] = json.loads(run(DECODE, tmp_path / "model", tmp_path / switch, dtype, switch, on_gpu=True))
    assert said["0"]["replays"] == 0 and said["1"]["replays"] > 8 * 40
    if dtype == "float64":
        assert said["1"]["answers"] == said["0"]["answers"]
    else:  # near ties fall as sums are ordered, and all that follows is another text: most beginnings have to agree
        same = [
            one[0] == other[0]
            for way, sequences in said["1"]["answers"].items()
            for one, other in zip(sequences, said["0"]["answers"][way], strict=True)
        ]
        assert sum(same) >= 0.75 * len(same)


def test_fused_graphs_decode(tmp_path: Path) -> None:
    """A compiled layer that can not be recorded, or stores keys in a copy of the cache."""
    random_llama(tmp_path / "model", confident=True)
    said = {}
    for switch in ("fused", "0"):
        (tmp_path / switch).mkdir()
        said[switch] = json.loads(
            run(DECODE, tmp_path / "model", tmp_path / switch, "float64", switch, "threshold", on_gpu=True)
        )
    assert said["fused"]["replays"] > 2 * 40 and said["fused"]["answers"] == said["0"]["answers"]
