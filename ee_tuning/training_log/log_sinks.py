"""Destinations of a run's records: metrics.jsonl, log.txt, the terminal, and dashboards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.config import Config
from ee_tuning.model.backbone import layers_in_words
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.atomic_write import os_errors_as_input_errors
from ee_tuning.training_log.dashboards import tensorboard, weights_and_biases
from ee_tuning.training_log.metrics import METRICS, MetricsFile, MetricsGatherer, MetricsRecord
from ee_tuning.training_log.progress_display import ProgressDisplay
from ee_tuning.training_log.speed_up import implied_speed_ups

Sink = Callable[[MetricsRecord], None]


@contextmanager
def open_log_sinks(config: Config, topology: Topology, loaded: LoadedModel, step: int) -> Iterator[MetricsGatherer]:
    """Yields the gatherer to which this stage posts its records of steps after `step`."""
    if not topology.is_logging_rank:
        yield MetricsGatherer(topology, _ignore)
        return
    folder, last = Path(config.tuning.run_folder), config.tuning.train_iters
    file = MetricsFile(folder / METRICS, resume_after=step or None)
    with (
        ProgressDisplay(folder / "log.txt", last, step) as display,
        tensorboard(folder, step) as events,
        weights_and_biases(config) as online,
    ):
        layout = f"tensor {topology.tp} × pipeline {topology.pp} × replicas {topology.dp}"
        display.say(f"{layers_in_words()} · torch {torch.__version__} on {topology.device.type} · {layout}")
        sinks: list[Sink] = [file.write, display.show, *events, *online]
        reached = step

        def take(record: MetricsRecord) -> None:
            nonlocal reached
            reached = record["step"]
            if record["kind"] == "validation" and loaded.exits is not None and loaded.exits.draft is None:
                record = {**record, "speed_up": implied_speed_ups(record, loaded.model.config, loaded.exits.heads)}
            with os_errors_as_input_errors(folder):
                for sink in sinks:
                    sink(record)

        yield MetricsGatherer(topology, take)
        if reached < last:
            display.say(f"stopped after step {reached}; the same command continues from there")
    file.close()


def _ignore(record: MetricsRecord) -> None:
    """Ignores a record. Only the logging rank has sinks."""
