"""Requests of all kinds that come, end and are broken off over pipeline stages say what they say in one process."""

import random
from pathlib import Path

import pytest
from exits import write_exits
from mixtures import EOS, VOCAB
from random_models import random_llama

from ee_tuning import EarlyExitLLM
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
POLICIES = [
    Policy(thresholds={2: 0.4, 4: 0.3}),
    Policy(thresholds={2: 0.0}),
    Policy(thresholds={4: 0.5}, measure="margin"),
    Policy(fixed_exit=2),
    Policy(fixed_exit=4),
    Policy(drafts_at=(2, 4)),
    Policy(drafts_at=(2,), looks_up=True),
    FULL,
]
BROKEN_OFF = {0: 3, 2: 0, 7: 5, 12: 2, 17: 4, 21: 3}
"""Request -> tokens after which it is, at the earliest."""


def mixture_at(model: str, exits: str, tp: int, pp: int, layout: tuple[int, ...] = ()) -> list[tuple[list[int], str]]:
    """Tokens and end of 24 requests that join an engine with room for five; some are broken off."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(
        load_config(
            None,
            {
                "model.path": model,
                "exits.path": exits,
                "model.dtype": "float64",
                "parallel.pipeline_layout": list(layout),
            },
        ),
        topology,
    )
    engine = Engine(
        loaded.model, loaded.stages, num_slots=5, max_length=64, max_pending=3, prefill_chunk=7, eos_ids=(EOS,)
    )
    rng, sequences, ends = random.Random(11), [], {}
    for place in range(24):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 4, 9, 20]))]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 24),
            temperature=rng.choice([0.0, 1.0]),
            seed=place,
            stop_token_ids=tuple(rng.sample(range(VOCAB), 4)),
        )
        (sequence,) = engine.add_request(prompt, params, POLICIES[place % len(POLICIES)])
        sequences.append(sequence)
        if place in BROKEN_OFF:
            ends[sequence.number] = BROKEN_OFF[place]
        for _ in range(rng.choice([0, 0, 1, 3])):
            _step(engine, sequences, ends)
    while not engine.is_idle:
        _step(engine, sequences, ends)
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert len({s.finish_reason for s in sequences}) == 3, "abort, stop and length all happen"
    # How many tokens a check brings is a matter of measured time, and so whether one is past its end when it is broken
    # off.
    return [
        (s.output[: ends.get(s.number, 99)], "" if s.speculates and s.number in ends else s.finish_reason)
        for s in sequences
    ]


def _step(engine: Engine, sequences: list, ends: dict[int, int]) -> None:
    engine.step()
    for sequence in sequences:
        if not sequence.finish_reason and sequence.num_output >= ends.get(sequence.number, 99):
            engine.abort(sequence)


def text_at(exits: str, pp: int) -> list[tuple[str, str]]:
    """Completions of the shipped model that end at a stop string, under several policies."""
    llm = EarlyExitLLM.from_config(
        load_config(
            None,
            {
                "model.path": str(SHIPPED),
                "exits.path": exits,
                "model.dtype": "float64",
                "parallel.pipeline_model_parallel_size": pp,
            },
        )
    )
    said = []
    for keys in ({"threshold": 0.3}, {"policy": "speculative"}, {"policy": "fixed", "exit_layer": 3}):
        made = llm.generate(
            ["def main(", "import ", "class A:\n"], max_new_tokens=24, stop=["\n", "e"], max_batch_size=2, **keys
        )
        said += [(each.text, each.finish_reason) for each in made]
    assert "stop" in {reason for _, reason in said}
    return said


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)
    return str(folder / "model"), str(write_exits(folder / "model", folder / "exits"))


@pytest.mark.parametrize(("tp", "pp", "layout"), [(1, 2, ()), (2, 2, ()), (2, 2, (0, 6)), (1, 4, ())])
def test_mixtures_say_the_same_over_stages(world, subject, tp, pp, layout):
    """A stage that learns too late, or never, that a sequence has ended; states of one that is gone taken for
    another's; a hang; a first stage that has the embedding alone.
    """
    wanted = mixture_at(*subject, 1, 1)
    for answer in world.run(mixture_at, *subject, tp, pp, layout):
        assert answer == wanted


def test_stop_strings_end_completions_on_every_stage(world, tmp_path):
    """One rank that goes on behind a stop string waits for the others for ever."""
    exits = write_exits(SHIPPED, tmp_path / "exits", exit_layers=[3, 9], init="copy", architecture="norm")
    wanted = text_at(str(exits), 1)
    for answer in world.run(text_at, str(exits), 4):
        assert answer == wanted
