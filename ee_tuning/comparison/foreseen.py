"""Checks, before anything runs, of what the steps of a comparison would refuse after hours of other steps."""

import dataclasses

from ee_tuning.artifact.convert import described_heads
from ee_tuning.comparison.job import CompareOptions
from ee_tuning.config import Config, replace
from ee_tuning.errors import InputError
from ee_tuning.evaluation.evaluate import greedy_params
from ee_tuning.generation.options import check_sizes
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.tuning.settings import check_settings


def check_steps(config: Config, options: CompareOptions, shape: ModelConfig, depths: tuple[int, ...]) -> None:
    """Raises InputError where the layout, the new exits, the tuning or the decoding of a step can not be.

    `config` is `as_compared`.
    """
    parallel, generation = config.parallel, config.generation
    shape.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    check_sizes(generation)
    greedy_params(generation).check(shape.vocab_size)
    check_settings(config.tuning)
    if any(way.endswith(("-ce", "-kl")) for way in options.ways):
        check_settings(replace(config, tuning={"trainable": options.trainable}).tuning)
    if {"exits", "fitted"} & set(options.ways):
        if config.exits.output == "shared":
            raise InputError("exits.output = shared is the way sorted of compare, not exits; leave --exit-output out")
        can_fit = options.tokens > shape.hidden_size
        layers = tuple(sorted(depths))
        described_heads(dataclasses.replace(config.exits, init="fitted" if can_fit else "copy"), layers, shape)
