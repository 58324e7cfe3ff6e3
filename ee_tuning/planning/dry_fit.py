"""Dry run of the fit before the first step: the real code on fake tensors, for one rank of every stage."""

import time
from dataclasses import dataclass

import numpy as np

from ee_tuning.artifact.load import Sources, build_stage
from ee_tuning.artifact.shapes import as_tuned, shape_sources
from ee_tuning.artifact.stage_plans import plan_fitting
from ee_tuning.config import Config, replace
from ee_tuning.data.loader import batches_of_each
from ee_tuning.data.tokens import DocumentRules, PackedSamples
from ee_tuning.parallel.fake_world import fake_world
from ee_tuning.planning.dry_relay import DryRelay
from ee_tuning.planning.memory_tracker import MemoryTracker
from ee_tuning.tuning.fitting import FitPass, num_fit_tokens


@dataclass(frozen=True, kw_only=True)
class FitProfile:
    """The costs of one rank of a stage during the fit."""

    stage: int
    rank: int
    layers: tuple[int, int]
    """First and last layer."""
    num_bytes: int
    """Peak bytes in use."""
    flops: int
    """Operations of one micro-batch."""
    num_micro_batches: int
    """Micro-batches that a replica reads in the whole fit."""
    num_tokens: int
    """Tokens that all replicas read in the whole fit."""
    seconds: float
    """Seconds that the dry run took."""


def profile_fit(config: Config, world_size: int) -> list[FitProfile]:
    """Profiles one rank of every stage, with as many micro-batches as wait there at a time for the final states.

    Returns an empty list where nothing is fitted. The default of model.dtype is bfloat16. Raises InputError as `tune`
    would.
    """
    config = as_tuned(config)
    if config.exits.path is not None or config.exits.init != "fitted":
        return []
    config = replace(config, model={"dtype": config.model.dtype or "bfloat16"})
    sources, num_stages = shape_sources(config), config.parallel.pipeline_model_parallel_size
    return [
        _profile_rank(config, sources, world_size, stage, stage * world_size // num_stages)
        for stage in range(num_stages)
    ]


def print_fit(profiles: list[FitProfile]) -> None:
    """Prints a line per stage."""
    for each in profiles:
        print(
            f"fitting exits, stage {each.stage}: rank {each.rank}, layers {each.layers[0]}..{each.layers[1]}; "
            f"{each.num_bytes / 1e9:.1f} GB at the most, {each.num_tokens:,} tokens; {each.seconds:.1f} s"
        )


def _profile_rank(config: Config, sources: Sources, world_size: int, stage: int, rank: int) -> FitProfile:
    began, tracker, tuning = time.perf_counter(), MemoryTracker(), config.tuning
    count = config.parallel.pipeline_model_parallel_size - stage + 1  # later ones cost the same
    samples = PackedSamples(
        np.zeros(tuning.seq_length + 1, dtype=np.int32), tuning.seq_length, rules=DocumentRules.of(config.data)
    )
    with fake_world(config.parallel, world_size, rank) as topology, tracker.account():
        assert sources.exits is not None
        plans = plan_fitting(config, sources.config, sources.exits, topology)
        loaded = build_stage(sources, plans, topology)
        fit = FitPass(loaded, tuning, topology, DryRelay)
        tracker.peak.clear()  # the peak of loading, which happens in parts
        chosen = [0] * (count * tuning.micro_batch_size * topology.dp)
        with tracker.during("fit"):
            fit.run(list(batches_of_each(samples, chosen, tuning, dp=topology.dp, dp_rank=topology.dp_rank)))
        dp = topology.dp
    num_tokens = num_fit_tokens(tuning, sources.config.hidden_size)
    return FitProfile(
        stage=stage,
        rank=rank,
        layers=(plans[stage].first_layer, plans[stage].last_layer),
        num_bytes=tracker.peak.total(),
        flops=tracker.flops["fit"] // count,
        num_tokens=num_tokens,
        num_micro_batches=-(-num_tokens // (tuning.seq_length * tuning.micro_batch_size * dp)),
        seconds=time.perf_counter() - began,
    )
