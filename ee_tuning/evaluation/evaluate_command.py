"""Inputs and outputs of `ee-tuning evaluate`. `evaluate.py` measures; rank 0 reads and writes."""

import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from ee_tuning import __version__
from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.config import Config, replace
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.errors import InputError
from ee_tuning.evaluation.evaluate import Block, Procedure, evaluate
from ee_tuning.evaluation.evaluation_folder import (
    OWNER,
    READINGS,
    EvaluationFolder,
    Settings,
    check_folder,
    settings_in,
)
from ee_tuning.evaluation.evaluation_report import print_tables, write_reports
from ee_tuning.evaluation.figures import Evaluation
from ee_tuning.evaluation.points import Point, PolicySweep, chosen_by_budgets, points_of
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.evaluation.task import Metric, Task, read_tasks
from ee_tuning.generation.budget_exit import budgets_of_tree, budgets_tree
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.many import model_fingerprint, model_settings
from ee_tuning.line_file import read_lines
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.progress import ProgressLines, progress_bar
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.owner import owned

BUDGETS = "--budget"
"""Key of the exits that budgets chose, among the settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The command's options beside its job."""

    tasks: tuple[Path, ...]
    metrics: tuple[Metric, ...]
    """One for all tasks, or one for each."""
    output: Path
    overwrites: bool = False
    sweep: PolicySweep
    against: str | None = None
    """Another model, whose full depth everything is compared with."""
    limit: int | None = None
    """Most prompts of each task."""
    block: int = 0
    repeats: int = 1


def evaluate_tasks(config: Config, options: EvaluateOptions) -> None:
    """Measures, and writes results, figures, page and pictures to `options.output`. A stopped command continues.

    Raises InputError, before the model is loaded, on unusable tasks, metrics and outputs.
    """
    topology = init_parallel(config.parallel)
    tasks = on_first_rank(topology, lambda: _read(config, options))
    with owned(options.output, topology, lock_file=options.output / OWNER):
        _evaluate(config, options, topology, tasks)
    destroy_parallel()


def _read(config: Config, options: EvaluateOptions) -> list[Task]:
    """Reads the tasks. Nothing is written."""
    if not options.tasks:
        raise InputError("evaluate needs a task, got none; give --task FILE.jsonl")
    options.sweep.check()
    sources = (
        *options.tasks,
        *options.sweep.calibrations,
        config.model.path,
        config.model.adapter,
        config.exits.path,
        config.data.tokenizer,
        config.data.chat_template,
        options.against,
    )
    check_apart(options.output, sources, around=True)
    check_folder(options.output, options.overwrites)
    return read_tasks(options.tasks, options.metrics, limit=options.limit)


def _evaluate(config: Config, options: EvaluateOptions, topology: Topology, tasks: list[Task]) -> None:
    template = read_chat_template(config.data.chat_template)
    config = replace(config, generation={"budget": None})  # it is of one policy, and points have their own
    llm = EarlyExitLLM.from_config(config, topology)
    against = None if options.against is None else _other_model(config, options.against, llm, topology)
    own_name = None if against is None else _own_name(config)
    settings = on_first_rank(topology, lambda: {} if options.overwrites else settings_in(options.output))
    chosen = budgets_of_tree(settings.get(BUDGETS))
    points = points_of(llm, options.sweep, measure=config.generation.measure, own_name=own_name, chosen=chosen)
    procedure = Procedure(
        batch_size=config.generation.max_batch_size,
        block=options.block,
        repeats=options.repeats,
        chat_template=template,
    )
    opened: list[EvaluationFolder] = []

    def open_folder() -> dict[int, list[ItemResult]]:
        settings = _settings(llm, config, tasks, points, procedure)
        if options.against is not None:
            settings["--against"] = model_fingerprint(replace(config, model=_other_section(options.against)))
        opened.append(EvaluationFolder(options.output, settings, options.overwrites, session_of(topology)))
        return dict(opened[0].blocks)

    known = on_first_rank(topology, open_folder)
    num_known = len({(each.task, each.item) for readings in known.values() for each in readings})
    display = _Display(
        sum(len(task.items) for task in tasks),
        len(points),
        num_known,
        options.output,
        is_shown=topology.is_logging_rank,
    )

    def keep(block: Block, readings: list[ItemResult]) -> None:
        on_first_rank(topology, lambda: opened[0].keep(block.number, readings))
        display.keep(block.size)

    with display:
        found = evaluate(
            llm,
            tasks,
            points,
            procedure,
            known=known,
            on_block=keep,
            on_prompts=lambda count: display.count(count * topology.dp),
            against=against,
        )
    on_first_rank(topology, lambda: _report(config, options, llm, tasks, found, opened[0]))


def _other_section(path: str) -> dict[str, Any]:
    """The keys of section `model` for --against."""
    return {"path": path, "adapter": None, "config": None}


def _own_name(config: Config) -> str:
    """The name of the point of all layers of the model itself."""
    return "all layers" + (" with the adapter" if config.model.adapter else "")


def _other_model(config: Config, path: str, llm: EarlyExitLLM, topology: Topology) -> EarlyExitLLM:
    """Loads the model of --against. Raises InputError where its tokens are not those of `llm`."""
    whole = replace(config, model=_other_section(path), exits={"path": None})
    other = EarlyExitLLM.from_config(whole, topology)
    sizes = [each.model.config.vocab_size for each in (llm, other)]
    if sizes[0] != sizes[1] or llm.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(
            f"--against must be a model with the same tokens as {config.model.path}, and {path} has a vocabulary of "
            f"{sizes[1]} for {sizes[0]}, or other words in it; give the model that this one was made from"
        )
    return other


def _settings(
    llm: EarlyExitLLM, config: Config, tasks: Sequence[Task], points: Sequence[Point], procedure: Procedure
) -> Settings:
    """Returns everything that the figures depend on."""
    topology, generation, chosen = llm.model.topology, config.generation, chosen_by_budgets(points)
    is_chat = any(item.messages for task in tasks for item in task.items)
    template = (
        hashlib.sha256(ChatTemplate(llm.tokenizer, procedure.chat_template).source().encode()).hexdigest()[:16]
        if is_chat
        else None
    )
    return {
        **model_settings(llm, config),
        "max_new_tokens": generation.max_new_tokens,
        "stop": generation.stop,
        "stop_token_ids": generation.stop_token_ids,
        "ignore_eos": generation.ignore_eos,
        "chat template": template,
        "max_batch_size": procedure.batch_size,
        "--block": procedure.block_size(topology.dp),
        "--repeats": procedure.repeats,
        "tensor × pipeline × data": f"{topology.tp} × {topology.pp} × {topology.dp}",
        **{f"task {task.name}": f"{task.metric}, {len(task.items)} prompts, {task.digest()}" for task in tasks},
        **({BUDGETS: budgets_tree(chosen)} if chosen else {}),
        **{point.name: point.description() for point in points},
    }


def session_of(topology: Topology) -> dict[str, Any]:
    """Describes the machine and software of this world."""
    device = topology.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "processes": topology.world_size,
        "ee_tuning": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = read_lines(Path("/proc/cpuinfo"))
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _report(
    config: Config,
    options: EvaluateOptions,
    llm: EarlyExitLLM,
    tasks: list[Task],
    found: Evaluation,
    folder: EvaluationFolder,
) -> None:
    folder.close()
    about = {
        "model": model_folder(config.model.path).name,
        **({} if options.against is None else {"against": model_folder(options.against).name}),
        "num_layers": llm.num_layers,
        "exit_layers": list(llm.exit_layers),
        "settings": folder.settings,
        "sessions": folder.sessions,
    }
    paths = write_reports(found, tasks, about, options.output)  # first, because standard output may be closed
    print_tables(found)
    print(f"wrote {', '.join(map(str, paths))}")


class _Display:
    """Progress: a bar of prompts at a terminal, a line now and then elsewhere, and a note on Ctrl-C. A context
    manager.
    """

    def __init__(self, num_prompts: int, num_points: int, num_known: int, output: Path, *, is_shown: bool) -> None:
        self._num, self._done, self._known, self._output = num_prompts, num_known, num_known, output
        self._is_shown = is_shown
        self._within = 0
        """Prompts measured within the current block."""
        self._lines = ProgressLines(num_known)
        policies = TextColumn(f"evaluating {num_points} policies")
        self._bar = progress_bar(policies, BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), is_shown=is_shown)
        self._row = self._bar.add_task("", total=num_prompts, completed=num_known)

    def __enter__(self) -> "_Display":
        if self._is_shown and self._known:
            left = f"{self._num - self._known} are left" if self._known < self._num else "nothing is left to measure"
            say(f"{self._known} of {self._num} prompts are in {self._output / READINGS} already: {left}")
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if self._is_shown and kind is not None and issubclass(kind, KeyboardInterrupt):
            stored = f"{self._done} of {self._num} prompts are stored in {self._output / READINGS}"
            say(f"ee-tuning: stopped; {stored}: the same command continues")

    def count(self, num_prompts: int) -> None:
        """Adds prompts of a block that is not stored yet."""
        self._within += num_prompts
        self._show()

    def keep(self, num_prompts: int) -> None:
        """Adds a stored block of this many prompts."""
        self._done, self._within = self._done + num_prompts, 0
        self._show()

    def _show(self) -> None:
        done = min(self._done + self._within, self._num)
        self._bar.update(self._row, completed=done)
        if self._bar.disable and self._is_shown:
            self._lines.show(f"{done:,} of {self._num:,} prompts", done, self._num)
