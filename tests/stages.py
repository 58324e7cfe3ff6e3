"""Requests that come, end and are broken off over pipeline stages, for tests and for `make stress`."""

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

from mixtures import EOS, VOCAB

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.cost_model import Costs
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.speculation import Speculation
from ee_tuning.kernel import calls
from ee_tuning.parallel.topology import Topology, init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

POLICIES = {
    "thresholds": Policy(thresholds={2: 0.4, 4: 0.3}),
    "first exit": Policy(thresholds={2: 0.3}),
    "last exit": Policy(thresholds={4: 0.3}),
    "fixed": Policy(fixed_exit=4),
    "full": FULL,
}
BROKEN_OFF = {1: 4, 5: 9, 8: 2}
"""Request -> tokens after which it is, at the earliest."""


class Run(NamedTuple):
    """What became of a dozen requests, and how it went."""

    said: list[tuple[list[int], list[int], str]]
    """Tokens, exit layers and end of each."""
    num_overlaps: int
    """Steps in which some said a token while others were on their way."""
    num_put_back: int
    """Those that lost their memory for a while."""
    num_broken_off: int
    """Those that were broken off while they waited for a later stage."""


@dataclass(frozen=True)
class Way:
    """How the stages lie."""

    tp: int = 1
    pp: int = 1
    layout: tuple[int, ...] = ()
    plain: tuple[int, ...] = ()
    """Stages without the kernels."""


def run_at(model: str, exits: str, way: Way, policy: Policy, cache_tokens: int | None = None, seed: int = 5) -> Run:
    """In one process piece by piece; over stages as the engine sees fit. With little memory nobody ends early."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=way.tp, pipeline_model_parallel_size=way.pp))
    with mock.patch.object(calls, "kernels", (lambda *_: None) if topology.stage in way.plain else calls.kernels):
        return _run(topology, model, exits, way, policy, cache_tokens, seed)


def _run(
    topology: Topology, model: str, exits: str, way: Way, policy: Policy, cache_tokens: int | None, seed: int
) -> Run:
    loaded = load_for_generation(
        load_config(
            None,
            {
                "model.path": model,
                "exits.path": exits,
                "model.dtype": "float64",
                "parallel.pipeline_layout": list(way.layout),
            },
        ),
        topology,
    )
    engine = Engine(
        loaded.model,
        loaded.stages,
        num_slots=5,
        max_length=64,
        max_pending=5,
        prefill_chunk=16,
        eos_ids=(EOS,),
        cache_tokens=cache_tokens,
    )
    if policy.drafts_at:  # heads so dear that drafts never pay
        costly, free = (1.0,) * 3, (1e-6,) * 3
        costs = Costs((free,) * len(engine.segments), dict.fromkeys(policy.drafts_at, costly), free)
        engine.proposer.speculation = Speculation(costs, engine.segments)
    rng, num_overlaps, num_broken_off = random.Random(seed), 0, 0
    sequences: list[Sequence] = []
    came: dict[int, list[int]] = defaultdict(list)
    while len(sequences) < 12 or not engine.is_idle:
        if len(sequences) < 12:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 20]))]
            params = SamplingParams(max_tokens=rng.randrange(12, 40), ignore_eos=cache_tokens is not None)
            sequences += engine.add_request(prompt, params, policy)
        for _ in range(rng.choice([1, 2, 5])):
            steps = engine.step()
            num_overlaps += bool(steps) and bool(engine.in_flight.busy)
            assert len(engine.in_flight) <= 2 * way.pp, "more words unheard than the link lets be under way"
            for step in steps:
                came[step.sequence.number].append(step.token_id)
            num_broken_off += _break_off(engine, sequences)
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks
    assert all(came[s.number] == s.output for s in sequences), "a token came twice or never"
    ends = [BROKEN_OFF.get(place, 99) for place in range(12)]
    said = [
        (s.output[:end], s.statistics.exit_layers[:end], "" if end < 99 else s.finish_reason)
        for s, end in zip(sequences, ends, strict=True)
    ]
    return Run(said, num_overlaps, sum(s.was_preempted for s in sequences), num_broken_off)


def _break_off(engine: Engine, sequences: list[Sequence]) -> int:
    """While they wait for a later stage, or a little later."""
    num_waiting = 0
    for place, sequence in enumerate(sequences):
        is_waiting = sequence.number in engine.in_flight.busy
        if place in BROKEN_OFF and sequence.num_output >= BROKEN_OFF[place] + 5 * (not is_waiting):
            engine.abort(sequence)
            num_waiting += is_waiting
    return num_waiting
