"""Every layout TP × PP decodes the tokens that one process decodes."""

from pathlib import Path

import pytest
import torch
from decoding import decode, policy_for, run_all
from exits import write_exits
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel, load_for_generation
from ee_tuning.calibration.calibrate import read_exits
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]
NEW_TOKENS = 10
GREEDY = SamplingParams(max_tokens=NEW_TOKENS)
DRAWN = SamplingParams(
    max_tokens=NEW_TOKENS, temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, seed=3, repetition_penalty=1.3, logprobs=3
)
JOBS = [
    ({"threshold": 0.5}, GREEDY),
    ({"threshold": 0.3}, DRAWN),
    ({"threshold": 0.2, "measure": "margin"}, GREEDY),
    ({"threshold": "0.4,0.3", "measure": "entropy"}, GREEDY),
    ({"policy": "full"}, GREEDY),
    ({"policy": "fixed", "exit_layer": 2}, GREEDY),
]
SPECULATIVE = [({"policy": "speculative"}, GREEDY), ({"policy": "speculative"}, DRAWN)]


def decode_at(model: str, exits: str, tp: int, pp: int) -> list[list[tuple[list[int], list[tuple[int, float]]]]]:
    """Per job and prompt the tokens, and the exit layer and confidence of each."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(
        load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology
    )
    answers = []
    for keys, params in JOBS + SPECULATIVE:
        made = decode(loaded, PROMPTS, NEW_TOKENS, params=params, engine={"max_pending": 4, "prefill_chunk": 6}, **keys)
        if keys.get("policy") == "speculative":  # which exit drafts is a matter of measured time, what is said is not
            answers.append([(said.tokens, []) for said in made])
            continue
        answers.append(
            [
                (
                    said.tokens,
                    [(layer, round(c, 9)) for layer, c in zip(said.exit_layers, said.confidences, strict=True)],
                )
                for said in made
            ]
        )
    return [*answers, drafted_alone(loaded), *in_little_memory(loaded)]


def drafted_alone(loaded: LoadedModel) -> list[tuple[list[int], list[tuple[int, float]]]]:
    """What one sequence says for which one exit drafts."""
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=64, max_pending=4)
    (sequence,) = engine.add_request(PROMPTS[0], GREEDY, Policy(drafts_at=(2,)))
    run_all(engine)
    return [(sequence.output, [])]


def in_little_memory(loaded: LoadedModel) -> list[list[tuple[list[int], list[tuple[int, float]]]]]:
    """Requests that begin alike, in memory for half of them; what was reused and read again stands where exit layers
    stand above.
    """
    answers = []
    for keys in ({"threshold": 0.4}, {"policy": "speculative"}, {"policy": "full"}):
        engine = Engine(
            loaded.model, loaded.stages, num_slots=4, max_length=64, max_pending=4, prefill_chunk=10, cache_tokens=64
        )
        made = [
            engine.add_request(
                [*range(7, 27), i], SamplingParams(max_tokens=24, temperature=0.5), policy_for(loaded.model, **keys)
            )[0]
            for i in range(3)
        ]
        run_all(engine)
        told = [(s.statistics.num_reused, 0.0) for s in made] + [(s.statistics.num_read_again, 0.0) for s in made]
        is_told = "policy" not in keys and loaded.model.topology.pp == 1
        answers.append([(s.output, told if is_told else []) for s in made])
    return answers


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)  # 101 tokens: every TP pads the vocabulary
    return folder / "model", write_exits(folder / "model", folder / "exits")


@pytest.fixture(scope="module")
def alone(subject):
    """What one process decodes."""
    return decode_at(*map(str, subject), 1, 1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_layouts_decode_the_same(world, subject, alone, tp, pp):
    """A padded id that wins, a shard summed twice, hidden states sent out of order, stages that disagree on who
    left.
    """
    model, exits, wanted = *map(str, subject), list(alone)
    assert {layer for layer, _ in wanted[0][0][1]} > {2}
    reused, read_again = wanted[-3][0][1][:3], wanted[-3][0][1][3:]
    assert max(reused) > (0, 0.0) and max(read_again) > (0, 0.0)
    if pp > 1:  # a sequence is a token further, or not, when memory runs out: other stages may be at work on it
        wanted[-3] = [(output, []) for output, _ in wanted[-3]]
    for answer in world.run(decode_at, model, exits, tp, pp):
        assert answer == wanted


def readings_at(model: str, exits: str, tp: int) -> dict[str, list[float]]:
    """What exits say of some tokens, as calibration reads them."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp))
    loaded = load_for_generation(
        load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology
    )
    readings = read_exits(loaded.model, [torch.arange(40) * 7 % 100])
    told = {f"{layer} {measure}": values for (layer, measure), values in readings.confidences.items()}
    return {
        name: [round(value, 9) for value in values.tolist()]
        for name, values in {
            **told,
            **{f"{layer} agrees": agrees.double() for layer, agrees in readings.agrees.items()},
        }.items()
    }


def test_tensor_parallel_ranks_calibrate_the_same(world, subject):
    """A threshold from a shard's confidences, or ranks that write different ones."""
    model, exits = map(str, subject)
    wanted = readings_at(model, exits, 1)
    assert len(wanted) == 8
    for answer in world.run(readings_at, model, exits, 2):
        assert answer == wanted
