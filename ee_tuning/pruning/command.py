"""`ee-tuning prune`: leaves layers out of a model. The cost is measured and shown before anything is written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.artifact.exit_heads import ExitHeadsReader, check_output
from ee_tuning.artifact.stage_plans import compute_dtype
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.checkpoint.model_size import parameters_by_part
from ee_tuning.config import Config, ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.evaluation.layer_stream import SAMPLE_LENGTH, LayerStream
from ee_tuning.export import folder_writer, megatron_writer, plain_folder
from ee_tuning.export.export_source import ExportSource, check_target, open_for_export
from ee_tuning.export.tokenizer_files import special_tokens, with_tokenizer_files
from ee_tuning.json_file import to_json
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel, world_size
from ee_tuning.pruning.choice import (
    Drop,
    Layers,
    Measure,
    blocks,
    deepest_block,
    least_influential,
    most_similar_block,
    read_drop,
)
from ee_tuning.pruning.measure import HeldOutText, held_out_halves, measure_losses, measure_turns
from ee_tuning.pruning.moved_exits import MovedExits, moved_config, moved_exits, write_moved_exits
from ee_tuning.pruning.pruned_model import kept_layers, pruned_config, pruned_source
from ee_tuning.pruning.report import PruningReport, PruningRow, pruning_card
from ee_tuning.storage.apart import check_apart, check_beside
from ee_tuning.storage.atomic_write import check_file
from ee_tuning.storage.owner import owned

NUM_SAMPLES = 64
MARKS = {"hf": folder_writer.MARKS, "megatron": megatron_writer.MARKS}


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Options of `ee-tuning prune` beside the job."""

    drop: Sequence[str]
    measure: Measure = "angular"
    num_samples: int = NUM_SAMPLES
    picture: Path = Path("prune.png")
    output: Path | None = None
    """Folder of the pruned model; None: only the picture is written."""
    exits_output: Path | None = None
    """Folder of the moved exits; by default `output` with -exits at its end."""
    model_format: str = "hf"
    overwrite: bool = False
    as_json: bool = False


def prune(config: Config, options: PruneOptions) -> None:
    """Measures, prints and draws, and writes the pruned model and its exits. Raises InputError where the model, its
    exits, the text or the layers can not be used, or an output can not be written; nothing is left behind then.
    """
    _check_options(config, options)
    opened = open_model(config.model)
    with opened.source:  # before the processes meet, so that a mistake is reported at once
        read_drop(options.drop, opened.config.num_layers)
    with with_tokenizer_files(config) as files:
        prune_within(files, options, init_parallel(layout_of(config)))
    destroy_parallel()


def prune_within(config: Config, options: PruneOptions, topology: Topology) -> None:
    """Does the work of `prune` in a world that exists. All ranks call it."""
    from ee_tuning.pruning.picture import draw_pruning

    with open_for_export(config, topology) as model:
        on_first_rank(topology, lambda: _check_outputs(config, options))
        drop = read_drop(options.drop, model.model.num_layers)
        if drop.layers is not None:
            _moved(model, drop.layers)
        report = _measured(config, options, drop, model, topology)
        moved = _moved(model, report.chosen.layers)
        if topology.is_logging_rank:
            draw_pruning(report, options.picture)
            _print(report, moved, options)
        if options.output is not None:
            _write(config, options, model, report, moved, topology)


def _check_options(config: Config, options: PruneOptions) -> None:
    if options.num_samples < 2:
        raise InputError(f"--samples must be at least 2, got {options.num_samples}; {NUM_SAMPLES} is usual")
    if options.exits_output is not None and config.exits.path is None:
        raise InputError("--exits-output is where exits go, got none; give --exits FOLDER, or leave it out")
    check_file(options.picture, "--picture")
    check_beside(options.picture, config, config.data.valid_paths, "--picture")


def _check_outputs(config: Config, options: PruneOptions) -> None:
    if options.output is None:
        return
    check_target(config, options.output, options.overwrite, MARKS[options.model_format])
    check_apart(options.output, config.data.valid_paths)
    if config.exits.path is None:
        return
    exits_output = _exits_output(options)
    check_output(exits_output, options.overwrite)
    inputs = (config.model.path, config.exits.path, config.data.tokenizer, options.output, *config.data.valid_paths)
    check_apart(exits_output, inputs, "--exits-output")
    if exits_output.resolve() == options.output.resolve():
        raise InputError(f"--exits-output must not be --output {options.output}; give another folder")


def _exits_output(options: PruneOptions) -> Path:
    assert options.output is not None
    return options.exits_output or options.output.with_name(f"{options.output.name}-exits")


def layout_of(config: Config) -> ParallelSection:
    """Returns the layout of the measurement: one layer is in memory at a time, so there is nothing to cut into stages,
    and processes beyond tensor parallelism share the samples. A single process does all the work.
    """
    if world_size() == 1:
        return ParallelSection()
    return dataclasses.replace(config.parallel, pipeline_model_parallel_size=1, pipeline_layout=())


def _moved(model: ExportSource, dropped: Layers) -> MovedExits | None:
    """Returns the new places of the exits, or None without exits. Raises InputError where they can not be moved."""
    if model.artifact is None:
        return None
    kept = kept_layers(model.model.num_layers, dropped)
    moved = moved_exits(model.artifact.config, kept)
    moved_config(model.artifact.config, moved, kept)
    return moved


def _measured(
    config: Config, options: PruneOptions, drop: Drop, model: ExportSource, topology: Topology
) -> PruningReport:
    shape, measure = model.model, options.measure
    shape.check_layout(topology.tp, 1)
    choosing, held_out = held_out_halves(config, shape, options.num_samples, topology)
    stream = LayerStream(
        model.source,
        shape,
        topology,
        compute_dtype(config, topology),
        min(SAMPLE_LENGTH, shape.max_position_embeddings),
        in_step=True,
    )
    most = drop.count if measure == "perplexity" else max(drop.count, shape.num_layers // 2)
    counts = range(1, min(most, shape.num_layers - 2) + 1)
    by_measure = _choices(stream, choosing, measure, counts)
    simple = [deepest_block(shape.num_layers, count) for count in counts]
    chosen = drop.layers or by_measure[drop.count - 1]
    losses = measure_losses(stream, held_out, [(), chosen, *by_measure, *simple])
    pruned = pruned_config(shape, kept_layers(shape.num_layers, chosen))
    return PruningReport(
        model_name=model.name,
        num_layers=shape.num_layers,
        measure=measure,
        chosen=PruningRow(chosen, losses[chosen]),
        is_listed=drop.layers is not None,
        full_loss=losses[()],
        rows=[PruningRow(layers, losses[layers]) for layers in by_measure],
        deepest=[PruningRow(layers, losses[layers]) for layers in simple],
        num_tokens=held_out.num_labels,
        num_parameters=(parameters_by_part(shape)["all"], parameters_by_part(pruned)["all"]),
    )


def _choices(stream: LayerStream, text: HeldOutText, measure: Measure, counts: Sequence[int]) -> list[Layers]:
    """Returns the layers that `measure` leaves out, for each of `counts`."""
    num_layers = stream.model.num_layers
    if measure == "deepest":
        return [deepest_block(num_layers, count) for count in counts]
    if measure == "perplexity":
        candidates = {count: blocks(num_layers, count) for count in counts}
        losses = measure_losses(stream, text, [block for each in candidates.values() for block in each])
        return [min(each, key=losses.__getitem__) for each in candidates.values()]
    turns = measure_turns(stream, text)
    if measure == "angular":
        return [most_similar_block(turns.distances, count) for count in counts]
    return [least_influential(turns.influences, count) for count in counts]


def _print(report: PruningReport, moved: MovedExits | None, options: PruneOptions) -> None:
    if options.as_json:
        exits = {} if moved is None else {"exits": moved.layers, "exits_left_out": moved.left_out}
        output = None if options.output is None else str(options.output)
        print(to_json({**report.tree(), **exits, "picture": str(options.picture), "output": output}), flush=True)
        return
    lines = [*report.lines(), *(() if moved is None else moved.lines()), f"drew {options.picture}"]
    if options.output is None:
        lines.append("no model is written without --output, or with --dry-run")
    print("\n".join(lines), flush=True)


def _write(
    config: Config,
    options: PruneOptions,
    model: ExportSource,
    report: PruningReport,
    moved: MovedExits | None,
    topology: Topology,
) -> None:
    output, dropped = options.output, report.chosen.layers
    assert output is not None
    special = special_tokens(config) if options.model_format == "hf" else {}
    pruned = pruned_source(model, dropped, special)
    card = pruning_card(report, pruned.model.family, moved.layers if moved else {}, options.model_format)
    with owned(output, topology):
        if options.model_format == "megatron":
            megatron_writer.write_megatron_folder(pruned, output, topology, card=card)
        else:
            tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
            plain_folder.write_plain_folder(
                pruned, pruned.source, pruned.model, pruned.description, card, output, topology, tokenizer
            )
    written = [output]
    if moved is not None:
        assert isinstance(model.artifact, ExitHeadsReader)
        written.append(_exits_output(options))
        with owned(written[-1], topology):
            write_moved_exits(
                model.artifact,
                moved,
                pruned,
                output.resolve().name,
                kept_layers(report.num_layers, dropped),
                written[-1],
                topology,
                overwrite=options.overwrite,
            )
    if topology.is_logging_rank and not options.as_json:
        print("\n".join(f"wrote {each}" for each in written), flush=True)
