"""The text that `ee-tuning calibrate` measures on."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ee_tuning.calibration.calibrate import ExitObservations, joined, read_exits
from ee_tuning.config import Config
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.generation.replicas import over_replicas
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model_config.config import ModelConfig

SAMPLE_LENGTH = 512


def samples_of(config: Config, model: ModelConfig, *, by_document: bool = False) -> Samples:
    """Returns data.valid_paths, or else the documents of data.paths that tune holds out. `by_document` as in
    load_samples.
    """
    data = config.data
    if not (data.valid_paths or data.paths):
        raise InputError(
            "calibrate needs text, got none; give --data FILE (data.valid_paths), best one that the heads were not tuned on"
        )
    if data.valid_paths:
        data = dataclasses.replace(data, paths=data.valid_paths, valid_paths=(), valid_fraction=0.0, split=None)
    length, needs_validation = min(SAMPLE_LENGTH, model.max_position_embeddings), not config.data.valid_paths
    splits = load_job_samples(
        config, model, data=data, seq_length=length, needs_validation=needs_validation, by_document=by_document
    )
    samples = splits.train if config.data.valid_paths else splits.valid
    assert samples is not None
    return samples


@dataclasses.dataclass(frozen=True)
class SampledText:
    """One sample."""

    tokens: Tensor
    """[s] int64"""
    counts: Tensor
    """[s] bool: whether the model is to predict the token's successor; in a chat, only the assistant's words."""


def draw(samples: Samples, positions: Iterable[int]) -> Iterator[SampledText]:
    """Yields the samples at `positions` of their first order, in which each occurs once."""
    order = samples.order(0)
    for position in positions:
        sample = samples.sample(order.sample_at(position))
        yield SampledText(torch.from_numpy(sample.tokens[:-1]), torch.from_numpy(sample.loss_mask) > 0)


def read_drawn(model: EarlyExitModel, drawn: Iterable[SampledText]) -> ExitObservations:
    """Runs the exits on the tokens that count. Replicas share the samples; all ranks call it, and know all."""

    def read(share: list[SampledText]) -> list[ExitObservations]:
        readings = read_exits(model, [each.tokens for each in share]).only(torch.cat([each.counts for each in share]))
        return [readings.only(readings.samples == place) for place in range(len(share))]

    return joined(over_replicas(list(drawn), read, model.topology, work=lambda each: len(each.tokens)))
