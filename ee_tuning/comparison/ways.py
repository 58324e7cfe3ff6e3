"""The ways to a faster model that are compared: which commands make each, and which models are then measured.

A way is a function from the comparison to entries; the table `WAYS` at the end names them. A new way is a function of a
few lines and a row. Steps that several ways share have the same output, and are run once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ee_tuning.command_steps import Flag, Step
from ee_tuning.comparison.job import Comparison
from ee_tuning.comparison.texts import Texts
from ee_tuning.pruning.choice import Measure

HEADS_RATE, HEAL_RATE, SORTED_RATE = 1e-3, 1e-3, 3e-4
"""Default learning rates: of exit heads, of low-rank matrices beside the layers, and of the layers themselves."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of a way, or a model and its exits, as one evaluation measures it."""

    name: str
    """The name of its evaluation's folder."""
    steps: tuple[Step, ...]
    """What makes it, in order."""
    model: str
    adapter: Path | None = None
    exits: Path | None = None
    fixed: tuple[int, ...] = ()
    """Exit layers at which all tokens leave."""
    leaves_early: bool = False
    """Whether thresholds and speculation are measured."""
    tokens: int = 0
    """Tokens that its weights were trained on or fitted to."""


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    name: str
    summary: str
    entries: Callable[[Comparison, Texts], list[Entry]]
    rate: float | None = None
    """Its learning rate, where it is tuned."""


def _exits(job: Comparison, texts: Texts) -> list[Entry]:
    """Heads that begin fitted, or copied where there are too few tokens for a fit."""
    begun = _fitted_step(job) if job.can_fit else _converted_step(job)
    tuned = job.folder / "exits"
    tune = _tune(job, "exits", tuned / "exit_heads", job.rate("exits", HEADS_RATE), exits=begun.makes)
    return [_exit_entry(job, "exits", (begun, tune), tuned / "exit_heads")]


def _tied(job: Comparison, texts: Texts) -> list[Entry]:
    tuned = job.folder / "tied"
    new: dict[str, Flag] = {"architecture": "norm", "exit_output": "tied", "init": "copy", "output_vocab": 0}
    step = _tune(job, "tied", tuned / "exit_heads", job.rate("tied", HEADS_RATE), exit_layers=_listed(job), **new)
    return [_exit_entry(job, "tied", (step,), tuned / "exit_heads")]


def _fitted(job: Comparison, texts: Texts) -> list[Entry]:
    step = _fitted_step(job)
    return [_exit_entry(job, "fitted", (step,), step.makes, tokens=job.fit_tokens, leaves_early=False)]


def _pruned(job: Comparison, texts: Texts, measure: Measure | None = None) -> list[Entry]:
    entries = []
    for depth in job.depths:
        step = _prune_step(job, texts, depth, measure or job.options.measure)
        entries.append(Entry(name=step.makes.name, steps=(step,), model=str(step.makes)))
    return entries


def _healed(job: Comparison, texts: Texts, way: str, measure: Measure | None = None) -> list[Entry]:
    """Pruned models, tuned by cross-entropy, or to the whole model's distribution (`kl` in the way's name)."""
    teacher: dict[str, Flag] = {"teacher_model": job.model} if "-kl" in way else {}
    entries = []
    for depth in job.depths:
        prune = _prune_step(job, texts, depth, measure or job.options.measure)
        folder = job.folder / f"{way}-{depth}"
        tune = _tune(
            job,
            folder.name,
            folder / "run" / "adapter",
            job.rate(way, HEAL_RATE),
            model=prune.makes,
            trainable=job.options.trainable,
            **teacher,
        )
        merge = Step(
            f"merge what was trained into {folder.name}",
            folder / "model",
            partial(
                job.run,
                f"{folder.name}-merge",
                "export",
                format="hf",
                model=prune.makes,
                adapter=tune.makes,
                output=folder / "model",
            ),
        )
        entries.append(
            Entry(
                name=folder.name,
                steps=(prune, tune, merge),
                model=str(merge.makes),
                tokens=job.tuning_tokens,
            )
        )
    return entries


def _sorted(job: Comparison, texts: Texts) -> list[Entry]:
    """Sub-models that end in the model's own head, all trained together (SoFT, arXiv 2309.08968)."""
    folder = job.folder / "sorted"
    own: dict[str, Flag] = {"architecture": "norm", "init": "copy", "output_vocab": 0}  # whatever exits are to be
    new: dict[str, Flag] = {"exit_layers": _listed(job), "exit_output": "shared", "trainable": "backbone", **own}
    step = _tune(job, "sorted", folder / "exit_heads", job.rate("sorted", SORTED_RATE), **new)
    return [
        dataclasses.replace(
            _exit_entry(job, "sorted", (step,), folder / "exit_heads"),
            adapter=folder / "adapter",
        )
    ]


def _exit_entry(
    job: Comparison,
    name: str,
    steps: tuple[Step, ...],
    exits: Path,
    *,
    tokens: int | None = None,
    leaves_early: bool = True,
) -> Entry:
    return Entry(
        name=name,
        steps=steps,
        model=job.model,
        exits=exits,
        fixed=job.depths,
        leaves_early=leaves_early,
        tokens=job.tuning_tokens if tokens is None else tokens,
    )


def _listed(job: Comparison) -> str:
    return ",".join(map(str, sorted(job.depths)))


def _fitted_step(job: Comparison) -> Step:
    output = job.folder / "fitted"
    flags: dict[str, Flag] = {"exit_layers": _listed(job), "init": "fitted", "fit_tokens": job.fit_tokens}
    run = partial(job.run, "fitted", "convert", **flags, output=output)
    return Step(f"fit exits after layers {_listed(job)} by least squares", output, run, tokens=job.fit_tokens)


def _converted_step(job: Comparison) -> Step:
    output = job.folder / "copied"
    run = partial(job.run, "copied", "convert", exit_layers=_listed(job), init="copy", output=output)
    return Step(f"copy exits after layers {_listed(job)} from the model", output, run)


def _prune_step(job: Comparison, texts: Texts, depth: int, measure: Measure) -> Step:
    name = f"pruned-{depth}" if measure == job.options.measure else f"pruned-{measure}-{depth}"
    output, dropped = job.folder / name, job.shape.num_layers - depth
    flags: dict[str, Flag] = {"data": texts.choosing, "drop": f"auto:{dropped}", "measure": measure}
    picture = job.folder / f"{name}.png"
    run = partial(job.run, name, "prune", **flags, picture=picture, output=output)
    return Step(f"leave out {dropped} layers by {measure}: {name}", output, run)


def _tune(job: Comparison, name: str, makes: Path, lr: float, **flags: Flag) -> Step:
    """A run of `tune`, whose folder is the parent of `makes`."""
    run = partial(
        job.run,
        name,
        "tune",
        train_iters=job.num_steps,
        lr=lr,
        set=[f"tuning.min_lr={min(job.config.tuning.min_lr, lr)}"],
        output=makes.parent,
        **flags,
    )
    return Step(f"tune {name}, {job.num_steps} steps", makes, run, tokens=job.tuning_tokens)


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("exits", "exit heads, fitted and tuned; the model is frozen", _exits, HEADS_RATE),
        Way("tied", "norms alone before the model's own output matrix, tuned; the model is frozen", _tied, HEADS_RATE),
        Way("fitted", "exit heads by a linear fit alone", _fitted),
        Way("pruned", "layers left out, nothing tuned", _pruned),
        Way("healed-ce", "pruned, then tuned by cross-entropy", partial(_healed, way="healed-ce"), HEAL_RATE),
        Way("healed-kl", "pruned, then distilled from the model", partial(_healed, way="healed-kl"), HEAL_RATE),
        Way("sorted", "sub-models of fewer layers, all trained together with the model", _sorted, SORTED_RATE),
        Way("deepest", "the deepest layers but the last left out", partial(_pruned, measure="deepest")),
        Way(
            "deepest-kl",
            "the deepest but the last left out, then distilled",
            partial(_healed, way="deepest-kl", measure="deepest"),
            HEAL_RATE,
        ),
    )
}
"""Name -> way, in the order of tables."""
DEFAULT_WAYS = ("exits", "tied", "fitted", "pruned", "healed-ce", "healed-kl", "sorted")


def all_steps(entries: Sequence[Entry]) -> list[Step]:
    """Returns the steps of all entries, each once."""
    return list({step.makes: step for entry in entries for step in entry.steps}.values())
