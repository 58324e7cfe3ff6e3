"""`ee-tuning compare`: makes a model faster in several ways, each with the same tokens, and measures them all alike.

Every step is a command that a user could type, runs once, and leaves its result in a folder of its own: the same
command goes on after a kill. A way that fails is left out of the table, with its reason beneath it; the others go on.
"""

import dataclasses
from functools import partial
from typing import Any

from rich.console import Console

from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.command_steps import run_command
from ee_tuning.comparison.entries import entries_of, run_entries
from ee_tuning.comparison.folder import OWNER, RATES, check_folder, check_same, data_stamp, write_job
from ee_tuning.comparison.foreseen import check_steps
from ee_tuning.comparison.job import (
    CompareOptions,
    Comparison,
    RunCommand,
    as_compared,
    check_options,
    check_tokens,
    depths_of,
    settings_of,
)
from ee_tuning.comparison.plan import print_plan, rates_of
from ee_tuning.comparison.report import write_report
from ee_tuning.comparison.rows import BASELINE, Row, baseline, failed, read_evaluation, rows_of
from ee_tuning.comparison.texts import LOSS_TASK, SPEED_TASK, Texts, texts_of
from ee_tuning.comparison.ways import Entry
from ee_tuning.config import Config, DataSection, replace
from ee_tuning.errors import InputError
from ee_tuning.evaluation.task import Task, read_tasks
from ee_tuning.generation.many import model_fingerprint
from ee_tuning.interrupts import term_raises
from ee_tuning.parallel.launcher import launched_rank
from ee_tuning.storage.owner import owned


def compare(config: Config, options: CompareOptions, run: RunCommand | None = None) -> int:
    """Makes and measures all ways, and writes the report. Returns the exit code: 1 where a way failed.

    `run` replaces the start of a process for each command. Raises InputError, before anything runs, where the model,
    the text, the ways or the folder can not be used.
    """
    launched = launched_rank()
    if launched is not None and launched.world_size > 1:
        raise InputError(
            "compare is one process, which starts torchrun for each step; start it without torchrun, and give "
            "--tensor-model-parallel-size, --pipeline-model-parallel-size and --nproc"
        )
    check_options(config, options)
    shape = read_shape(config.model)
    config = as_compared(config, shape)
    check_tokens(config, options, shape)
    depths = depths_of(config, options, shape.num_layers)
    check_steps(config, options, shape, depths)
    tasks = _tasks(options)
    stamp = data_stamp(config)
    check_folder(config, options)
    comparison = Comparison(
        config=config,
        options=options,
        shape=shape,
        depths=depths,
        metrics={task.name: task.metric for task in tasks},
        run_command=run or partial(run_command, Console(stderr=True, highlight=False)),
    )
    if options.dry_run:
        print_plan(comparison, entries_of(comparison, Texts(options.output / "text", config.data)))
        return 0
    with owned(options.output, None, lock_file=options.output / OWNER), term_raises():
        facts: dict[str, Any] = {"data": stamp, "model": model_fingerprint(config), RATES: rates_of(comparison)}
        facts |= {f"task {task.name}": f"{task.metric}, {task.digest()}" for task in tasks}
        settings = settings_of(config, options, comparison.depths, facts)
        check_same(options.output, settings)
        texts = texts_of(config, shape, options.output, options.num_samples, options.num_prompts, settings)
        comparison = dataclasses.replace(comparison, config=_of_steps(config, texts.data))
        write_job(comparison)
        return _run(comparison, entries_of(comparison, texts), settings)


def _run(comparison: Comparison, entries: list[tuple[str, Entry]], settings: dict[str, Any]) -> int:
    print_plan(comparison, entries)
    errors = run_entries(entries)
    rows = list[Row]()
    for way, entry in entries:
        if entry.name in errors:
            rows.append(failed(way, entry, errors[entry.name]))
            continue
        folder = entry.steps[-1].makes.parent
        measured, place = read_evaluation(folder), folder.relative_to(comparison.folder).as_posix()
        if not rows or rows[0].way != BASELINE:
            rows.insert(0, baseline(comparison.model, measured, place))
        rows += rows_of(way, entry, measured, place)
    write_report(comparison, rows, settings)
    return 1 if errors else 0


def _of_steps(config: Config, data: DataSection) -> Config:
    """The job that all steps share. Each names its model and exits itself."""
    return dataclasses.replace(replace(config, exits={"exit_layers": ()}), data=data)


def _tasks(options: CompareOptions) -> list[Task]:
    """Reads the tasks. Raises InputError where one can not be used."""
    if options.metrics and not options.tasks:
        raise InputError("--metric is of --task, got no task; give --task FILE.jsonl, or leave it out")
    return read_tasks(options.tasks, options.metrics, taken=(LOSS_TASK, SPEED_TASK)) if options.tasks else []
