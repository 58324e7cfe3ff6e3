"""Every layout TP × PP decodes the tokens that one process decodes."""
from pathlib import Path

import pytest
from exits import write_exits
from random_models import random_llama

from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import GenerationSection, ParallelSection, load_config
from ee_tuning.generation.engine import Engine, Sampling
from ee_tuning.generation.pieces import policy_of
from ee_tuning.parallel.topology import init_parallel

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]
JOBS = [({"threshold": 0.5}, Sampling()), ({"threshold": 0.3}, Sampling(temperature=1.2, top_k=30, top_p=0.9, seed=3)),
        ({"policy": "full"}, Sampling()), ({"policy": "fixed", "exit_layer": 2}, Sampling())]


def decode(model: str, exits: str, tp: int, pp: int) -> list[list[tuple[list[int], list[tuple[int, float]]]]]:
    """Per job and prompt the tokens, and the exit layer and confidence of each."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology)
    answers = []
    for keys, sampling in JOBS:
        engine = Engine(loaded.model, loaded.stages, num_slots=3, max_length=64, max_pending=4)
        policy = policy_of(GenerationSection(**keys), (2, 4), 6)
        sequences = [engine.add(prompt, sampling) for prompt in PROMPTS]
        left: dict[int, list[tuple[int, float]]] = {id(s): [] for s in sequences}
        for _ in range(16):
            for step in engine.step(policy):
                left[id(step.sequence)].append((step.exit_layer, round(step.confidence, 9)))
        answers.append([(s.tokens[s.num_prompt_tokens:], left[id(s)]) for s in sequences])
    return answers


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)  # 101 tokens: every TP pads the vocabulary
    return folder / "model", write_exits(folder / "model", folder / "exits")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_layouts_decode_the_same(world, subject, tp, pp):
    """A padded id that wins, a shard summed twice, hidden states sent out of order, stages that disagree on who left."""
    model, exits = map(str, subject)
    wanted = decode(model, exits, 1, 1)
    assert {layer for layer, _ in wanted[0][0][1]} > {2}
    for answer in world.run(decode, model, exits, tp, pp):
        assert answer == wanted
