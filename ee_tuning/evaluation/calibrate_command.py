"""What `ee-tuning calibrate` reads, writes and prints; the measuring is in `calibrate.py`."""
import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.checkpoint.apart import check_beside
from ee_tuning.checkpoint.aside import check_file, file_written_aside
from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import Config
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokenizer import tokenizer_of
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.evaluation.calibrate import MEASURES, Outcome, Readings, as_json, best_measure, curve, judge, read_exits
from ee_tuning.generation.calibration import FORMAT_VERSION
from ee_tuning.model.config import ModelConfig
from ee_tuning.parallel.topology import init_parallel, leave_parallel

SAMPLE_LENGTH = 512
HELD_OUT = 4
"""One sample of so many is held out."""


def calibrate(config: Config, flags: argparse.Namespace) -> None:
    """Measures, writes `flags.output` and the picture beside it, and prints a table. Raises InputError on what can not be used."""
    from ee_tuning.evaluation.calibrate_picture import draw_calibration

    if not 0 < flags.agreement < 1:
        raise InputError(f"--agreement must lie between 0 and 1, got {flags.agreement:g}; 0.95 is a good start")
    check_file(flags.output)
    picture = flags.output.with_suffix(".png")
    if picture == flags.output:
        raise InputError(f"--output takes the thresholds, and the picture beside them is {picture}; give a name that does not end in .png")
    for path in (flags.output, picture):
        check_beside(path, config, (*config.data.valid_paths, *config.data.paths))
    topology = init_parallel(config.parallel)
    if topology.world_size > topology.tp:
        raise InputError(f"calibrate takes tensor-parallel processes alone, got pipeline {topology.pp} × data {topology.dp}; launch "
                         f"{topology.tp}, or change parallel.*")
    loaded = load_for_generation(config, topology)
    model = loaded.model
    if not any(layer < model.config.num_layers for layer in model.plan.exit_layers):
        raise InputError("calibrate needs exits before the last layer, got none; give --exits FOLDER")
    samples = _samples(config, model.config)
    count = min(len(samples), -(-flags.tokens // samples.seq_length))
    if count < 2 * HELD_OUT:
        raise InputError(f"calibrate needs at least {2 * HELD_OUT * samples.seq_length} tokens, got {count * samples.seq_length}; give "
                         "more --data, or raise --tokens")
    chosen = [index for index in range(count) if index % HELD_OUT]
    readings = read_exits(model, _tokens(samples, chosen))
    held_out = read_exits(model, _tokens(samples, [index for index in range(count) if index % HELD_OUT == 0]))
    measure, thresholds = best_measure(readings, flags.agreement, flags.measure)
    found, seen = judge(readings, measure, thresholds), judge(held_out, measure, thresholds)
    if topology.is_logging_rank:
        curves = {layer: curve(readings, layer, measure) for layer in readings.exit_layers}
        tree = {"format_version": FORMAT_VERSION, "model_name": model_folder(config.model.path).name, "num_layers": model.config.num_layers,
                "heads_digest": loaded.heads_digest,
                "wanted_agreement": flags.agreement, "measure": measure, "thresholds": thresholds, "tokens": readings.num_tokens,
                "found": dataclasses.asdict(found), "held_out": {"tokens": held_out.num_tokens, **dataclasses.asdict(seen)},
                "curves": {each: {layer: curve(readings, layer, each) for layer in readings.exit_layers} for each in MEASURES}}
        with file_written_aside(flags.output) as aside:
            aside.write_text(as_json(tree), encoding="utf-8")
        draw_calibration(curves, thresholds, flags.agreement, measure, picture)
        _tell(flags, measure, readings, held_out, found, seen, picture)
    leave_parallel()


def _samples(config: Config, model: ModelConfig) -> Samples:
    """All of data.valid_paths; else the documents of data.paths that tune holds out."""
    data = config.data
    if not (data.valid_paths or data.paths):
        raise InputError("calibrate needs text, got none; give --data FILE (data.valid_paths), best one that the heads were not tuned on")
    if data.valid_paths:
        data = dataclasses.replace(data, paths=data.valid_paths, valid_paths=())
    splits = load_samples(data, tokenizer_of(config), seq_length=min(SAMPLE_LENGTH, model.max_position_embeddings),
                          vocab_size=model.vocab_size, max_positions=model.max_position_embeddings,
                          needs_validation=not config.data.valid_paths, trusts_code=config.model.trust_remote_code)
    samples = splits.train if config.data.valid_paths else splits.valid
    assert samples is not None
    return samples


def _tokens(samples: Samples, indices: list[int]) -> Iterator[Tensor]:  # of [s] int64
    order = samples.order(0)
    for index in indices:
        yield torch.from_numpy(samples.sample(order.sample_at(index)).tokens[:-1])


def _tell(flags: argparse.Namespace, measure: str, readings: Readings, held_out: Readings, found: Outcome, seen: Outcome,
          picture: Path) -> None:
    name = f"leaves from {measure}"
    print(f"exit  {name}  of those that come  agreement (at least)  held out")
    for layer, result in found.exits.items():
        if result.threshold is None:
            print(f"{layer:4}  not used: it can not be relied on to agree {flags.agreement:.1%} of the time; "
                  f"at its surest at least {result.agreement:.1%}")
        else:
            agreement = f"{result.agreement:.1%} ({result.at_least:.1%})"
            print(f"{layer:4}  {result.threshold:{len(name)}.4f}  {result.share:18.1%}  {agreement:>20}  "
                  f"{seen.exits[layer].agreement:8.1%}")
    if not any(result.threshold is not None for result in found.exits.values()):
        print(f"no exit agrees {flags.agreement:.1%} of the time: no token will leave early; tune the heads longer, or lower --agreement")
    print(f"{found.agreement:.1%} of {readings.num_tokens:,} tokens as the full model has them, at {found.mean_depth:.2f} of "
          f"{readings.num_layers} layers; {seen.agreement:.1%} of {held_out.num_tokens:,} held out, at {seen.mean_depth:.2f}")
    print(f"wrote {flags.output} and {picture}; next: ee-tuning generate --calibration {flags.output} …")
