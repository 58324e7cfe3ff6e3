"""Inputs and outputs of `ee-tuning calibrate`. `calibrate.py` measures; `guarantee_command.py` handles
`--guarantee`.
"""

import argparse
import dataclasses
from pathlib import Path
from shlex import quote

from ee_tuning.artifact.load import LoadedModel, load_for_generation
from ee_tuning.calibration.calibrate import (
    MEASURES,
    CalibrationResult,
    ExitObservations,
    best_measure,
    check_has_exits,
    curve,
    score_thresholds,
)
from ee_tuning.calibration.calibrate_text import draw, read_drawn, samples_of
from ee_tuning.calibration.guarantee_command import calibrate_with_guarantee
from ee_tuning.calibration.task_guarantee_command import calibrate_on_task
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.evaluation.calibration_file import write_calibration
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.storage.apart import check_beside
from ee_tuning.storage.atomic_write import check_file

AGREEMENT, TOKENS = 0.95, 50_000
HELD_OUT = 4
"""One of this many samples is held out."""


def calibrate(config: Config, flags: argparse.Namespace) -> None:
    """Measures, writes `flags.output` and its picture, and prints a table. Raises InputError on unusable inputs."""
    _check_flags(flags)
    check_file(flags.output)
    picture = flags.output.with_suffix(".png")
    if picture == flags.output:
        raise InputError(
            f"--output takes the thresholds, and the picture beside them is {picture}; give a name that does not end in .png"
        )
    for path in (flags.output, picture):
        check_beside(path, config, (*config.data.valid_paths, *config.data.paths, flags.task))
    topology = init_parallel(config.parallel)
    if flags.task is not None:
        calibrate_on_task(config, flags, topology, picture)
        _print_written(flags.output, picture, topology)
        destroy_parallel()
        return
    if topology.pp > 1:
        raise InputError(
            f"calibrate reads texts without pipeline stages, got pipeline {topology.pp}; leave "
            "--pipeline-model-parallel-size out: processes beyond tensor parallelism are replicas, which share the text"
        )
    loaded = load_for_generation(config, topology)
    check_has_exits(loaded.model.plan.exit_layers, loaded.model.config.num_layers)
    if flags.guarantee is not None:
        calibrate_with_guarantee(config, flags, loaded, picture)
    else:
        _calibrate_by_agreement(config, flags, loaded, picture)
    destroy_parallel()


def _check_flags(flags: argparse.Namespace) -> None:
    """Raises InputError, before anything is read, on flags that do not go together."""
    if flags.task is not None and flags.guarantee is None:
        raise InputError(f"--task {flags.task} is of --guarantee, and none is given; give --guarantee 0.05 with it")
    for name in ("metric", "thresholds"):
        if flags.task is None and getattr(flags, name) is not None:
            raise InputError(f"--{name} is of --task, and none is given; give --task FILE.jsonl with it")
    for flag, is_given in (("--data", "data.valid_paths" in flags.overrides), ("--tokens", flags.tokens is not None)):
        if flags.task is not None and is_given:
            raise InputError(f"{flag} does not apply to a guarantee by --task, which measures prompts; leave it out")
    if flags.guarantee is not None and flags.agreement is not None:
        raise InputError(
            f"--agreement {flags.agreement:g} and --guarantee {flags.guarantee:g} choose thresholds each in its own way; give "
            "one of them"
        )
    if flags.guarantee is None and flags.confidence is not None:
        raise InputError(
            f"--confidence {flags.confidence:g} is of --guarantee, and none is given; give --guarantee 0.05 with it"
        )
    for name, start in (("agreement", 0.95), ("guarantee", 0.05), ("confidence", 0.95)):
        value = getattr(flags, name)
        if value is not None and not 0 < value < 1:
            raise InputError(f"--{name} must lie between 0 and 1, got {value:g}; {start:g} is a good start")


def _calibrate_by_agreement(config: Config, flags: argparse.Namespace, loaded: LoadedModel, picture: Path) -> None:
    from ee_tuning.calibration.calibrate_picture import draw_calibration

    wanted = AGREEMENT if flags.agreement is None else flags.agreement
    samples = samples_of(config, loaded.model.config)
    count = min(
        samples.order(0).num_distinct, -(-(TOKENS if flags.tokens is None else flags.tokens) // samples.seq_length)
    )
    if count < 2 * HELD_OUT:
        raise InputError(
            f"calibrate needs at least {2 * HELD_OUT * samples.seq_length} tokens, got {count * samples.seq_length}; give "
            "more --data, or raise --tokens"
        )
    readings = read_drawn(loaded.model, draw(samples, [index for index in range(count) if index % HELD_OUT]))
    held_out = read_drawn(loaded.model, draw(samples, range(0, count, HELD_OUT)))
    measure, thresholds = best_measure(readings, wanted, flags.measure or "best")
    found, seen = score_thresholds(readings, measure, thresholds), score_thresholds(held_out, measure, thresholds)
    if not loaded.model.topology.is_logging_rank:
        return
    curves = {layer: curve(readings, layer, measure) for layer in readings.exit_layers}
    write_calibration(
        flags.output,
        config,
        loaded.model.config.num_layers,
        loaded.heads_digest,
        {
            "wanted_agreement": wanted,
            "measure": measure,
            "thresholds": thresholds,
            "tokens": readings.num_tokens,
            "found": dataclasses.asdict(found),
            "held_out": {"tokens": held_out.num_tokens, **dataclasses.asdict(seen)},
            "curves": {
                each: {layer: curve(readings, layer, each) for layer in readings.exit_layers} for each in MEASURES
            },
        },
    )
    draw_calibration(curves, thresholds, wanted, measure, picture)
    _print_summary(wanted, measure, readings, held_out, found, seen)
    if measure != "max_probability" and loaded.model.topology.device.type == "cpu":
        print(
            f"on a CPU, steps that ask for {measure} take torch's operators, about half as fast as the kernels; for decoding on "
            "a CPU, calibrate with --measure max_probability"
        )
    _print_written(flags.output, picture, loaded.model.topology)


def _print_written(output: Path, picture: Path, topology: Topology) -> None:
    if topology.is_logging_rank:
        print(f"wrote {output} and {picture}; next: ee-tuning generate --calibration {quote(str(output))} …")


def _print_summary(
    wanted: float,
    measure: str,
    readings: ExitObservations,
    held_out: ExitObservations,
    found: CalibrationResult,
    seen: CalibrationResult,
) -> None:
    name = f"leaves from {measure}"
    print(f"exit  {name}  of those that come  agreement (at least)  held out")
    for layer, result in found.exits.items():
        if result.threshold is None:
            print(
                f"{layer:4}  not used: it can not be relied on to agree {wanted:.1%} of the time; "
                f"at its surest at least {result.agreement:.1%}"
            )
        else:
            agreement = f"{result.agreement:.1%} ({result.at_least:.1%})"
            print(
                f"{layer:4}  {result.threshold:{len(name)}.4f}  {result.share:18.1%}  {agreement:>20}  "
                f"{seen.exits[layer].agreement:8.1%}"
            )
    if not any(result.threshold is not None for result in found.exits.values()):
        print(
            f"no exit agrees {wanted:.1%} of the time: no token will leave early; tune the heads longer, or lower --agreement"
        )
    print(
        f"{found.agreement:.1%} of {readings.num_tokens:,} tokens as the full model has them, at {found.mean_depth:.2f} of "
        f"{readings.num_layers} layers; {seen.agreement:.1%} of {held_out.num_tokens:,} held out, at {seen.mean_depth:.2f}"
    )
