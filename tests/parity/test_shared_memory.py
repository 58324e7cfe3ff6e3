"""Requests that begin alike share memory, and none is lost by it or by running out of it: every request says what it
says alone.
"""

from typing import Any

import pytest
from decoding import run_all
from mixtures import STEMS, Subject

from ee_tuning.engine.engine import Engine
from ee_tuning.engine.kv_cache import BlockPool, block_key
from ee_tuning.engine.sequence import Sequence
from ee_tuning.sampling.params import SamplingParams

POLICIES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"threshold": 0.4},
    {"policy": "fixed", "exit_layer": 2},
    {"policy": "speculative"},
]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
STEM = STEMS[0]


@pytest.fixture(scope="module", params=["mlp", "layer"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("subject"), architecture=request.param)


def say(
    engine: Engine, subject: Subject, prompt: list[int], policy: dict[str, Any], params: SamplingParams = PARAMS
) -> Sequence:
    """Alone in the engine, and as the plain decoder has it."""
    (sequence,) = engine.add_request(prompt, params, subject.policy(**policy))
    run_all(engine)
    check(subject, [sequence])
    return sequence


def check(subject: Subject, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.num_prompt_tokens]
        assert sequence.output == subject.wanted(prompt, sequence.params, sequence.policy, sequence.completion)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_ended_serves_the_next(subject, policy):
    """A block that is shared before all segments have filled it, or by one whose tokens before it are others."""
    engine = subject.engine()
    first = say(engine, subject, STEM[:40], policy)
    same = say(engine, subject, STEM[:40], policy)
    other_tail = say(engine, subject, [*STEM[:33], 1, 2], policy)
    other_beginning = say(engine, subject, [9, *STEM[1:40]], policy)
    whole_blocks = say(engine, subject, STEM[:32], policy)
    told = [s.statistics.num_reused for s in (first, same, other_tail, other_beginning, whole_blocks)]
    assert told == [0, 32, 32, 0, 16], "the newest token is always computed"


@pytest.mark.parametrize("policy", POLICIES)
def test_those_that_run_beside_each_other_share(subject, policy):
    """A beginning that is read once for each, or taken before it is there; a neighbour's end or abort that takes it
    away.
    """
    engine = subject.engine(prefill_chunk=8)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.2, n=3)
    made = engine.add_request(STEM[:37], params, subject.policy(**policy))
    (late,) = engine.add_request([*STEM[:36], 3], PARAMS, subject.policy(**policy))
    for _ in range(6):
        engine.step()
    engine.abort(made[0])
    run_all(engine)
    check(subject, [*made[1:], late])
    assert [s.statistics.num_reused for s in (*made, late)] == [0, 32, 32, 32]


def test_shallow_blocks_serve_shallow_requests_alone(subject):
    """Deep layers that read keys which a fixed exit never made."""
    fixed, full = {"policy": "fixed", "exit_layer": 2}, {"policy": "full"}
    engine = subject.engine()
    own = engine.stage.own_layers  # layers of heads, filled for those alone who ask
    for policy, reused in (
        (fixed, 0),
        (full, 0),
        (fixed, 32),
        (full, 32),
        ({"policy": "fixed", "exit_layer": 4}, 0 if own else 32),
    ):
        assert say(engine, subject, STEM[:40], policy).statistics.num_reused == reused


@pytest.mark.parametrize("policy", POLICIES[:2])
def test_what_was_said_serves_as_well(subject, policy):
    """A conversation that is read from its beginning at every turn; or tokens that left early, shared before they were
    taken deeper.
    """
    engine = subject.engine(max_pending=4)
    first = say(engine, subject, STEM[:10], policy, SamplingParams(max_tokens=34, ignore_eos=True))
    second = say(engine, subject, [*first.tokens, 5, 6], policy)
    assert second.statistics.num_reused in ((32,) if policy == POLICIES[0] else (16, 32))


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_that_is_wanted_is_taken_from_the_oldest(subject, policy):
    """A kept block that is handed out and still found; memory that nobody gives back."""
    engine = subject.engine(num_slots=1, cache_tokens=128)
    for stem in (STEMS[0], STEMS[1], STEMS[0], [4] * 40, STEMS[1], STEMS[0]):
        say(engine, subject, stem[:40], policy)
        assert engine.cache.pool.num_free == 8
    assert say(engine, subject, STEM[:40], policy).statistics.num_reused == 32


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_that_lost_its_memory_goes_on_as_if_it_had_not(subject, policy):
    """Tokens said twice or left out, a token asked at the wrong exit, draws that depend on how often a prompt was
    read.
    """
    engine = subject.engine(cache_tokens=96, max_pending=3, prefill_chunk=20)
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8)
    made = [engine.add_request([i, 2, 3], params, subject.policy(**policy))[0] for i in range(3)]
    run_all(engine)
    check(subject, made)
    assert any(s.was_preempted and s.statistics.num_read_again for s in made)
    assert not made[0].was_preempted, "the oldest goes on"
    assert engine.cache.pool.num_free == 6


def test_without_reuse_nothing_is_shared(subject):
    """A switch that does nothing: comparisons with and without would compare the same."""
    engine = subject.engine(reuses_prefixes=False)
    assert [say(engine, subject, STEM[:40], {"policy": "full"}).statistics.num_reused for _ in range(2)] == [0, 0]


def test_blocks_are_counted_and_the_oldest_goes_first():
    """A block with two holders that the first one's end frees; a beginning that goes before what follows it."""
    pool = BlockPool(4, run=1)
    a, b = block_key(b"", [1] * 16), block_key(b"", [2] * 16)
    blocks = pool.allocate(2)
    one, two = (frozenset(("piece", i) for i in range(n)) for n in (1, 2))
    pool.cache(blocks[0], a, one)
    pool.cache(blocks[1], block_key(a, [1] * 16), one)
    pool.incref(blocks[:1])
    pool.free(blocks)
    assert pool.num_free == 3 and pool.allocate(4) is None
    pool.free(blocks[:1])
    later = pool.allocate(1, after=blocks[1])
    pool.cache(later[0], b, two)
    pool.free(later)
    assert pool.find(a, one) == blocks[0] and pool.find(a, two) is None and pool.find(b, one) == later[0]
    assert pool.allocate(1) == [3], "an empty one is there"
    assert pool.allocate(1) == [blocks[1]] and pool.find(a, one) == blocks[0]
    assert pool.allocate(1) == [blocks[0]] and pool.find(a, one) is None and pool.find(b, two) == later[0]
