"""Over stages, tokens that left go on while later stages are with the others: what is said is what one process says
piece by piece.
"""

from itertools import product

import pytest
from exits import write_exits
from random_models import random_llama
from stages import POLICIES, Run, Way, run_at

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", confident=True)
    return str(folder / "model"), str(write_exits(folder / "model", folder / "exits", architecture="mlp", init="copy"))


WAYS = [
    Way(pp=2),
    Way(pp=2, layout=(4, 2)),
    Way(pp=4),
    Way(pp=2, plain=(0, 1)),
    Way(pp=2, plain=(1,)),
    Way(pp=2, layout=(0, 6)),
    Way(pp=4, plain=(0, 1, 2, 3)),
    Way(tp=2, pp=2),
]


@pytest.fixture(scope="module")
def wanted(subject: tuple[str, str]) -> dict[str, Run]:
    return {name: run_at(*subject, Way(), policy) for name, policy in POLICIES.items()}


@pytest.mark.parametrize(
    ("way", "policy"),
    [*product(WAYS, ("thresholds", "full")), *product(WAYS[:3], ("first exit", "last exit", "fixed"))],
    ids=lambda given: str(given),
)
def test_stages_say_what_one_process_says(world, subject, wanted, way, policy):
    """A word taken for another step's; states of a row that went on meanwhile; keys that stay missing behind who left;
    a hang.
    """
    for run in world.run(run_at, *subject, way, POLICIES[policy]):
        assert run.said == wanted[policy].said
        is_on_one_stage = way.layout == (0, 6) or (way.layout == (4, 2) and policy == "fixed")
        assert not run.num_overlaps if is_on_one_stage else run.num_overlaps or way.layout == (4, 2)
        if way == Way(pp=2) and policy == "thresholds":
            assert run.num_broken_off


@pytest.mark.parametrize("way", [Way(), Way(pp=2)], ids=str)
def test_where_drafts_do_not_pay_speculation_is_full_depth(world, subject, wanted, way):
    """Sequences that draft nothing, and keep all stages but one waiting because they might."""
    for run in world.run(run_at, *subject, way, Policy(drafts_at=(2, 4))):
        assert run.said == wanted["full"].said
        assert bool(run.num_overlaps) == (way.pp > 1)


def break_all_off_at(model: str, exits: str, pp: int) -> bool:
    """While some wait for later stages. Whether any did."""
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=pp))
    loaded = load_for_generation(
        load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology
    )
    engine = Engine(loaded.model, loaded.stages, num_slots=6, max_length=64)
    waited = False
    for number in range(4, 12):
        sequences = [engine.add_request([i, number], SamplingParams(max_tokens=30), FULL)[0] for i in range(6)]
        for _ in range(number):
            engine.step()
        waited |= len(engine.in_flight.busy) > 1
        if number % 2:
            engine.clear()
        for sequence in sequences:
            engine.abort(sequence)
        assert engine.is_idle and engine.link.num_pending == 0
        assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    return waited


@pytest.mark.parametrize("pp", [2, 4])
def test_requests_broken_off_on_their_way_leave_nothing(world, subject, pp):
    """A token of one that is gone, heard while another is broken off, for which the engine never is idle; sends that
    nobody waits for.
    """
    assert all(world.run(break_all_off_at, *subject, pp))


def test_steps_under_way_land_before_memory_is_taken_back(world, subject):
    """A row that loses its memory in the middle of a step, whose next stage then reads its places."""
    wanted = run_at(*subject, Way(), POLICIES["thresholds"], 80, 3)
    for run in world.run(run_at, *subject, Way(pp=4), POLICIES["thresholds"], 80, 3):
        assert run.said == wanted.said
        assert run.num_overlaps and run.num_put_back


def test_ranks_share_the_same_blocks(world, subject):
    """A block that the last stage has filled in a step whose end the others do not know yet: it alone finds it in its
    prefix cache, admits a request with fewer tokens to compute, and expects other states than are sent.
    """
    given = Way(pp=4, layout=(2, 2, 1, 1)), FULL, 80, 672606251
    wanted = run_at(*subject, Way(), *given[1:])
    for run in world.run(run_at, *subject, *given):
        assert run.said == wanted.said
