"""Calibrations with a guarantee by the thousand, on documents drawn from some whose losses were recorded: how often is
it broken?
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from decoding_stress import MODEL, Report, held_out_prompts
from exits import write_exits

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.calibration.calibrate import MEASURES, ExitObservations, read_exits
from ee_tuning.calibration.guarantee import Trials, earliest, prove, try_thresholds
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.config.generation import Measure
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.parallel.topology import init_parallel

EPSILON = 0.05
LENGTH = 64
"""Tokens of a document."""


@dataclass(frozen=True)
class _Case:
    units: str
    num_documents: int
    """That a calibration draws."""
    delta: float
    measures: tuple[Measure, ...]


CASES = [
    _Case(units, n, delta, measures)
    for units in ("documents", "single tokens")
    for n, delta in ((100, 0.1), (400, 0.05), (400, 0.2))
    for measures in (MEASURES, ("margin",))
]


def stress_calibrations(count: int, seed: int, folder: Path, num_documents: int = 1000) -> Report:
    """`count` calibrations of each case, drawn from `num_documents` that the shipped model did not learn from."""
    readings, report = record(folder, num_documents), Report()
    alone = readings.only(torch.arange(readings.num_tokens) % (LENGTH // 4) == 0)
    alone = ExitObservations(alone.confidences, alone.agrees, torch.arange(alone.num_tokens), alone.num_layers)
    trials = {
        units: {measure: try_thresholds(each, measure) for measure in MEASURES}
        for units, each in (("documents", readings), ("single tokens", alone))
    }
    worst, allowed = 0.0, EPSILON + 3 * math.sqrt(EPSILON * (1 - EPSILON) / count)
    lines = [
        "| drawn | how many | δ | measures | guarantee broken | by the mean loss alone | tokens leave in | expected loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        own = {measure: trials[case.units][measure] for measure in case.measures}
        broken, naive, gained, loss = _calibrate_often(own, case, count, seed)
        lines.append(
            f"| {case.units} | {case.num_documents} | {case.delta:g} | {len(case.measures)} | {broken:.1%} | {naive:.1%} | "
            f"{gained:.1%} | {loss:.2%} |"
        )
        if broken > allowed:
            report.failures.append(f"{case}: {broken:.1%} of the calibrations broke it, {allowed:.1%} may")
        worst = max(worst, naive)
    if worst <= allowed:
        report.failures.append(f"the mean loss alone is wrong in {worst:.1%} only: nothing was put to the test")
    report.told = (
        f"{count} calibrations of each row, drawn from {num_documents} held-out documents of {LENGTH} tokens, or from "
        f"{alone.num_tokens} of their tokens, by heads that were not tuned: a guarantee may be broken in {EPSILON:.0%} of "
        f"them, here {allowed:.1%} with three deviations. Single tokens have losses of 0 and 1, the hardest "
        "for the bounds. For comparison, the lowest threshold whose mean loss is at most δ.\n\n" + "\n".join(lines)
    )
    return report


def record(folder: Path, num_documents: int) -> ExitObservations:
    """What untuned exits say of held-out documents of LENGTH tokens."""
    exits = write_exits(MODEL, folder / "heads", exit_layers=[3, 6, 9], init="copy")
    config = load_config(None, {"model.path": str(MODEL), "exits.path": str(exits)})
    model, tokenizer = load_for_generation(config, init_parallel(ParallelSection())).model, load_tokenizer(MODEL)
    texts = [tokenizer.encode(prompt)[:LENGTH] for prompt in held_out_prompts(num_documents)]
    assert {len(text) for text in texts} == {LENGTH}
    return read_exits(model, map(torch.tensor, texts))


def _calibrate_often(
    trials: dict[Measure, Trials], case: _Case, count: int, seed: int
) -> tuple[float, float, float, float]:
    """Shares of `count` calibrations that break the guarantee, that would by the mean loss, in which tokens leave; and
    their mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    truths = {measure: each.losses.mean(0) for measure, each in trials.items()}
    depths = {measure: each.depths.mean(0) for measure, each in trials.items()}
    full, population = float(max(each.max() for each in depths.values())), len(next(iter(trials.values())).losses)
    broken = naive = gained = 0
    losses = []
    for _ in range(count):
        drawn = torch.randint(population, (case.num_documents,), generator=generator)
        proofs = prove(
            {measure: Trials(each.losses[drawn], each.depths[drawn]) for measure, each in trials.items()},
            case.delta,
            EPSILON,
        )
        measure = earliest(proofs)
        last = proofs[measure].num_proven - 1
        losses.append(float(truths[measure][last]) if last >= 0 else 0.0)
        broken += losses[-1] > case.delta
        gained += last >= 0 and float(depths[measure][last]) < full
        naive += (
            float(truths[measure][int((proofs[measure].losses <= case.delta).long().cumprod(0).sum()) - 1]) > case.delta
        )
    return broken / count, naive / count, gained / count, sum(losses) / count
