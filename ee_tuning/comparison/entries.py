"""All entries of a comparison, each with the step that measures it, and the running of their steps."""

import dataclasses
from functools import partial
from pathlib import Path

from rich.console import Console

from ee_tuning.command_steps import Flag, Step, run_step
from ee_tuning.comparison.job import Comparison
from ee_tuning.comparison.texts import Texts
from ee_tuning.comparison.ways import WAYS, Entry, all_steps
from ee_tuning.errors import InputError
from ee_tuning.evaluation.evaluation_folder import FIGURES
from ee_tuning.notices import warn

EVALUATIONS = "evaluations"


def entries_of(comparison: Comparison, texts: Texts) -> list[tuple[str, Entry]]:
    """Returns every entry with its way, and with its evaluation as the last step."""
    return [
        (name, dataclasses.replace(entry, steps=(*entry.steps, _measuring(comparison, texts, entry))))
        for name, way in WAYS.items()
        if name in comparison.options.ways
        for entry in way.entries(comparison, texts)
    ]


def run_entries(entries: list[tuple[str, Entry]]) -> dict[str, str]:
    """Runs the steps that are not done. Returns the error of each entry that failed, by its name."""
    console = Console(stderr=True, highlight=False)
    steps = all_steps([entry for _, entry in entries])
    places = {step.makes: place for place, step in enumerate(steps, 1)}
    broken, errors = dict[Path, str](), dict[str, str]()
    for _, entry in entries:
        for step in entry.steps:
            if step.makes not in broken:
                console.rule(f"{places[step.makes]} of {len(steps)}: {step.title}", align="left")
                try:
                    run_step(console, step)
                    continue
                except InputError as error:
                    warn(f"{entry.name} is left out: {error}")
                    broken[step.makes] = str(error)
            errors[entry.name] = broken[step.makes]
            break
    return errors


def _measuring(comparison: Comparison, texts: Texts, entry: Entry) -> Step:
    """Returns the step that measures an entry."""
    options, output = comparison.options, comparison.folder / EVALUATIONS / entry.name
    flags: dict[str, Flag] = {
        "model": entry.model,
        "task": [texts.held_out, texts.continued, *options.tasks],
        "metric": ["perplexity", "exact", *comparison.metrics.values()],
        "repeats": options.repeats,
        "thresholds": ",".join(f"{each:g}" for each in options.thresholds) if entry.leaves_early else "none",
    }
    if entry.exits is not None:
        flags["exits"] = entry.exits
    if entry.adapter is not None:
        flags["adapter"] = entry.adapter
    if entry.model != comparison.model or entry.adapter is not None:
        flags["against"] = comparison.model
    if entry.leaves_early:
        flags["speculative"] = True
    flags["fixed"] = [str(layer) for layer in sorted(entry.fixed)]
    run = partial(comparison.run, f"{entry.name}-evaluate", "evaluate", **flags, output=output)
    return Step(f"measure {entry.name}", output / FIGURES, run)
