"""Every request is decoded as if it were alone, by its own wishes, whatever runs beside it and wherever its memory
lies.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from decoding import run_all
from mixtures import LAYERS, Subject, mixture, own_penalties, theirs

from ee_tuning.engine.engine import TokenStep
from ee_tuning.engine.sequence import Sequence
from ee_tuning.errors import InputError
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("subject"))


def test_random_mixtures_equal_one_at_a_time(subject, tmp_path):
    """Whatever one request does to another: its memory, its beginning, its place in a pass, its policy, its draws, its
    end.
    """
    subjects = [subject, Subject(tmp_path, "layer,mlp")]
    seen = sum((mixture(subjects[seed % 2], seed) for seed in range(80, 120)), Counter())
    assert min(seen[what] for what in ("requests", "aborted", "reused", "put back", "scattered")) > 0, seen


PENALIZED = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "logit_bias": {3: 2.5, 77: -100}},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.1},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "seed": 4},
]


@pytest.mark.parametrize("keys", PENALIZED)
def test_logprobs_are_those_of_transformers(subject, keys):
    """Log-probabilities of the plain softmax, of another position, or of another head than the one that spoke."""
    prompt, params = [5, 17, 80, 3, 9], SamplingParams(max_tokens=12, logprobs=5, ignore_eos=True, **keys)
    engine = subject.engine()
    engine.add_request(prompt, params, subject.policy(threshold=0.5))
    tokens, left = list(prompt), set()
    for step in run_all(engine):
        logits = own_penalties(subject.plain.logits(tokens)[step.exit_layer][-1], tokens[len(prompt) :], params)
        known = theirs(params, len(prompt), frozenset())(torch.tensor([tokens]), logits[None])[0].log_softmax(-1)
        assert step.logprob == pytest.approx(known[step.token_id].item(), abs=1e-5)
        best, ids = known.topk(5)
        assert list(step.top_logprobs) == ids.tolist() and list(step.top_logprobs.values()) == pytest.approx(
            best.tolist(), abs=1e-5
        )
        tokens.append(step.token_id)
        left.add(step.exit_layer)
    assert len(left) > 1, "one head alone spoke"


def test_several_completions_differ_and_the_first_is_that_of_one(subject):
    """Completions that share their draws; or a first one that depends on how many are asked for."""
    params = SamplingParams(max_tokens=10, temperature=1.5, n=3, ignore_eos=True)
    engine = subject.engine()
    made = engine.add_request([5, 17], params)
    run_all(engine)
    assert len({tuple(s.output) for s in made}) == 3
    assert [s.output for s in made] == [subject.wanted([5, 17], params, FULL, i)[0] for i in range(3)]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_frees_every_block(subject, steps):
    """Memory that an abandoned request keeps, or its neighbour's that goes with it."""
    engine = subject.engine(num_slots=2, prefill_chunk=3)
    kept, gone, queued = (
        engine.add_request([7] * n, SamplingParams(max_tokens=8, ignore_eos=True), subject.policy(threshold=0.4))[0]
        for n in (5, 9, 3)
    )
    for _ in range(steps):
        engine.step()
    engine.abort(gone)
    engine.abort(queued)
    engine.abort(gone)
    assert gone.finish_reason == queued.finish_reason == "abort"
    run_all(engine)
    assert kept.output == subject.wanted([7] * 5, kept.params, kept.policy)[0]
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks


POLICIES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"threshold": 0.4},
    {"policy": "fixed", "exit_layer": 2},
    {"policy": "speculative"},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_says_what_each_says_alone(subject, policy, temperature):
    """Padding that a row sees, a neighbour's decision, a token in the wrong row: with lengths mixed, and half of them
    joining late.
    """
    params = SamplingParams(max_tokens=14, temperature=temperature, ignore_eos=True, seed=2)
    prompts = [[(3 * i + j) % 100 for j in range(length)] for i, length in enumerate((1, 40, 5, 17, 2, 33))]
    together, made = subject.engine(num_slots=5, prefill_chunk=24, max_pending=3), []
    for index, prompt in enumerate(prompts):
        made += together.add_request(prompt, params, subject.policy(**policy))
        for _ in range(index // 3 * 2):
            together.step()
    run_all(together)
    for sequence, prompt in zip(made, prompts, strict=True):
        (alone,) = (engine := subject.engine(num_slots=1)).add_request(prompt, params, sequence.policy)
        run_all(engine)
        assert sequence.output == alone.output == subject.wanted(prompt, params, sequence.policy)[0]
        if policy.get("policy") != "speculative":
            assert sequence.statistics.exit_layers == alone.statistics.exit_layers


@pytest.mark.parametrize("policy", POLICIES)
def test_the_end_of_the_context(subject, policy):
    """One token too many reads or writes past a sequence's memory; one too few stops early."""
    engine = subject.engine(num_slots=2)
    for length in (63, 62, 50):
        prompt = [(7 * i) % 90 for i in range(length)]
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        (sequence,) = engine.add_request(prompt, params, subject.policy(**policy))
        run_all(engine)
        assert sequence.finish_reason == "length" and len(sequence.tokens) == min(64, length + 30)
        assert sequence.output == subject.wanted(prompt, params, sequence.policy)[0]
    for length in (64, 65):
        with pytest.raises(InputError, match=rf"shorter than the context of 64 tokens, got {length}"):
            engine.add_request([1] * length)


def test_no_engine_is_longer_than_the_model(subject):
    """Positions that the model has no angles for, read from whatever lies behind them."""
    longest = subject.loaded.model.plan.max_length
    assert subject.engine(max_length=longest).cache.max_length == longest
    with pytest.raises(InputError, match=f"at most {longest}, .*got {longest + 1}"):
        subject.engine(max_length=longest + 1)


REFUSED: list[tuple[list[int], dict[str, Any], str]] = [
    ([], {}, "at least one token"),
    ([101], {}, "0..100.*got 101"),
    ([-1], {}, "got -1"),
    ([1], {"temperature": float("nan")}, "temperature.*nan"),
    ([1], {"temperature": -0.1}, "temperature.*-0.1"),
    ([1], {"top_p": 0.0}, "top_p"),
    ([1], {"top_p": 1.5}, "top_p"),
    ([1], {"top_k": -1}, "top_k"),
    ([1], {"min_p": 2.0}, "min_p"),
    ([1], {"max_tokens": 0}, "max_tokens"),
    ([1], {"min_tokens": 101}, "min_tokens.*0..100"),
    ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
    ([1], {"frequency_penalty": float("inf")}, "frequency_penalty.*inf"),
    ([1], {"logit_bias": {101: 1.0}}, "logit_bias.*101"),
    ([1], {"logit_bias": {1: float("nan")}}, "logit_bias.*nan"),
    ([1], {"stop": ("",)}, "empty"),
    ([1], {"stop": "ab"}, "tuple of strings"),
    ([1], {"stop_token_ids": (500,)}, "stop_token_ids.*500"),
    ([1], {"n": 0}, "n must"),
    ([1], {"logprobs": 200}, "logprobs"),
    ([1], {"seed": 1.5}, "seed"),
    ([1], {"max_tokens": True}, "max_tokens"),
]


def test_a_bad_request_is_refused_and_the_others_go_on(subject):
    """A value that no sampler can use, found in the middle of a step, would end every request."""
    engine = subject.engine()
    (good,) = engine.add_request([5, 17], SamplingParams(max_tokens=len(REFUSED) + 2, ignore_eos=True))
    for prompt, keys, words in REFUSED:
        engine.step()
        with pytest.raises(InputError, match=words):
            engine.add_request(prompt, SamplingParams(**keys))
    with pytest.raises(InputError, match="exits must be among 2, 4, got 3"):
        engine.add_request([1], policy=Policy(thresholds={3: 0.5}))
    run_all(engine)
    assert good.output == subject.wanted([5, 17], good.params, FULL)[0]


def test_requests_wait_for_memory_or_hear_what_would_fit(subject):
    """A request that is let in and can not be finished, or one that waits for ever."""
    engine = subject.engine(num_slots=4, cache_tokens=48)
    with pytest.raises(InputError, match=r"cache of 48 tokens, got 10 \+ 50; at most 38 new tokens fit"):
        engine.add_request([1] * 10, SamplingParams(max_tokens=50))
    made = [engine.add_request([i, 5], SamplingParams(max_tokens=28, ignore_eos=True))[0] for i in range(3)]
    engine.step()
    assert (len(engine.running), len(engine.waiting)) == (2, 1), "a third one could not grow"
    run_all(engine)
    assert [s.output for s in made] == [subject.wanted([i, 5], made[0].params, FULL)[0] for i in range(3)]


def test_lower_numbers_of_priority_come_first(subject):
    """Requests in the order in which they came, whatever they ask; one that is begun again and again by others."""
    engine, ended = subject.engine(num_slots=1), []
    params, priorities = SamplingParams(max_tokens=4, ignore_eos=True), [0, 5, -1, 5, 0]
    made = [engine.add_request([place, 5], params, priority=each)[0] for place, each in enumerate(priorities)]
    while not engine.is_idle:
        ended += [made.index(step.sequence) for step in engine.step() if step.sequence.finish_reason]
    assert ended == [2, 0, 4, 1, 3]
    assert made[1].output == subject.wanted([1, 5], params, FULL)[0]


def test_the_least_urgent_gives_its_memory(subject):
    """An urgent request that waits for one that came before it, or loses its memory to it."""
    engine = subject.engine(num_slots=2, cache_tokens=64)
    params = SamplingParams(max_tokens=44, ignore_eos=True)
    (late,) = engine.add_request([1, 5], params, priority=1)
    engine.step()
    (urgent,) = engine.add_request([2, 5], params)
    while not engine.is_idle:
        engine.step()
        assert not urgent.was_preempted
    assert late.was_preempted
    assert [each.output for each in (late, urgent)] == [subject.wanted([i, 5], params, FULL)[0] for i in (1, 2)]


def test_scattered_blocks_are_read_in_order(subject):
    """Blocks that do not follow each other, read as if they did."""
    engine = subject.engine(num_slots=4, cache_tokens=96)
    holders = [engine.add_request([i], SamplingParams(max_tokens=15 + 20 * (i % 2)))[0] for i in range(3)]
    engine.step()
    engine.abort(holders[0])
    engine.abort(holders[2])
    (late,) = engine.add_request(
        [9, 8, 7], SamplingParams(max_tokens=40, ignore_eos=True), subject.policy(threshold=0.5)
    )
    while len(late.tokens) < 20:
        engine.step()
    assert late.slot_mapping is not None and late.slot_mapping.first is None, (
        "the claim is empty where blocks follow each other"
    )
    run_all(engine)
    assert late.output == subject.wanted([9, 8, 7], late.params, late.policy)[0]


def test_an_exit_during_prefill_never_happens_unless_asked(subject):
    """The first token from an exit that was sure while the prompt was read, with the deep caches not filled."""
    engine = subject.engine(prefill_chunk=4)
    engine.add_request([3] * 11, SamplingParams(max_tokens=3), subject.policy(threshold=0.0))
    steps: list[TokenStep] = run_all(engine)
    assert [step.exit_layer for step in steps] == [LAYERS, 2, 2]


def test_statistics_tell_what_happened(subject):
    """Counts that do not add up."""
    engine = subject.engine(max_pending=4)
    sequence: Sequence
    (sequence,) = engine.add_request(
        [5, 17, 80], SamplingParams(max_tokens=20, ignore_eos=True), subject.policy(threshold=0.5)
    )
    steps = run_all(engine)
    told = sequence.statistics
    assert told.exit_layers == [step.exit_layer for step in steps] and len(steps) == 20
    # All that left behind layer 2 or 4 and was not the last to wait was taken on through each piece behind it.
    skipped = sum((told.exit_layers[:-1].count(2) * 2, told.exit_layers[:-1].count(4)))
    assert skipped - 8 <= told.num_catch_up <= skipped
    assert 0 <= told.seconds_waiting <= told.seconds_to_first_token <= told.seconds
