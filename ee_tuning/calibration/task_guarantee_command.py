"""Inputs and outputs of `ee-tuning calibrate --guarantee DELTA --task FILE --metric M`. `guarantee.py` runs the
tests.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from ee_tuning.calibration.calibrate import MEASURES
from ee_tuning.calibration.guarantee import Proof, documents_needed, earliest, prove
from ee_tuning.calibration.guarantee_picture import PictureLabels, draw_guarantee
from ee_tuning.calibration.task_losses import GRID, Scored, TaskScores, try_on_task
from ee_tuning.config import Config
from ee_tuning.config.generation import Measure
from ee_tuning.data.chat_template import read_chat_template
from ee_tuning.errors import InputError
from ee_tuning.evaluation.calibration_file import write_calibration
from ee_tuning.evaluation.points import FULL_DEPTH, check_thresholds
from ee_tuning.evaluation.task import Task, read_task
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

CONFIDENCE = 0.95
_BOUNDED = ("exact", "contains", "rouge-l", "choice")


def calibrate_on_task(config: Config, flags: argparse.Namespace, topology: Topology, picture: Path) -> None:
    """Measures, writes `flags.output` and its picture, and prints the result.

    Raises InputError, before the model is loaded, on an unusable task, metric or grid, and where prompts are too few.
    """
    measures: tuple[Measure, ...] = MEASURES if flags.measure == "best" else (flags.measure or "max_probability",)
    confidence = CONFIDENCE if flags.confidence is None else flags.confidence
    grid = tuple(sorted(flags.thresholds, reverse=True)) if flags.thresholds else GRID
    task: Task = on_first_rank(topology, lambda: _read(flags, grid))
    _check_number(len(task.items), flags.guarantee, confidence, len(measures))
    llm = EarlyExitLLM.from_config(config, topology)
    if not any(layer < llm.num_layers for layer in llm.exit_layers):
        raise InputError(
            "calibrate needs exits before the last layer, got none; give --exits FOLDER, of exits and not of a drafting head"
        )
    scores = TaskScores(llm, task, read_chat_template(config.data.chat_template))
    full, level = scores.by(FULL_DEPTH), (1 - confidence) / len(measures)

    def progress_line(threshold: float, loss: float, p_value: float) -> None:
        if topology.is_logging_rank:
            print(
                f"threshold {threshold:g}: {task.metric} drops by {loss:.2%} of a prompt, p = {p_value:.2g}",
                file=sys.stderr,
                flush=True,
            )

    proofs = prove(
        {
            measure: try_on_task(scores, full, measure, grid, flags.guarantee, level, progress_line)
            for measure in measures
        },
        flags.guarantee,
        1 - confidence,
        grid,
    )
    measure = earliest(proofs)
    early = sorted(layer for layer in llm.exit_layers if layer < llm.num_layers)
    if not topology.is_logging_rank:
        return
    write_calibration(
        flags.output,
        config,
        llm.num_layers,
        llm.heads_digest,
        {
            "measure": measure,
            "thresholds": dict.fromkeys(early, proofs[measure].threshold),
            "guarantee": _tree(config, task, flags.guarantee, confidence, proofs, full),
        },
    )
    draw_guarantee(
        proofs,
        measure,
        flags.guarantee,
        picture,
        PictureLabels(loss=f"Drop of {task.metric} below full depth's", of="of a prompt, %", units="prompts"),
    )
    _print_summary(task, flags.guarantee, confidence, measure, proofs[measure], full, llm.num_layers)


def _read(flags: argparse.Namespace, grid: tuple[float, ...]) -> Task:
    if flags.metric not in _BOUNDED:
        raise InputError(
            f"--metric must be one whose score lies in 0..1, {', '.join(_BOUNDED)}, got {flags.metric or 'none'}"
        )
    check_thresholds(grid)
    if len(set(grid)) < len(grid):
        raise InputError("--thresholds must be different, got one twice; leave it out")
    return read_task(flags.task, flags.metric)


def _check_number(num_prompts: int, delta: float, confidence: float, num_measures: int) -> None:
    needed = documents_needed(delta, (1 - confidence) / num_measures)
    if needed is not None and num_prompts < needed:
        raise InputError(
            f"--guarantee {delta:g} with --confidence {confidence:g} needs at least {needed:,} prompts, even where no score "
            f"ever drops, got {num_prompts:,}; give a task with more"
        )


def _tree(
    config: Config, task: Task, delta: float, confidence: float, proofs: Mapping[Measure, Proof], full: list[Scored]
) -> dict[str, object]:
    """Returns the guarantee for the calibration file, with all numbers needed to check the tests."""
    first = next(iter(proofs.values()))
    tests = {
        measure: {
            "num_proven": proof.num_proven,
            "losses": proof.losses.tolist(),
            "mean_depths": proof.depths.tolist(),
            "p_values": proof.p_values.tolist(),
        }
        for measure, proof in proofs.items()
    }
    return {
        "delta": delta,
        "confidence": confidence,
        "epsilon": 1 - confidence,
        "prompts": first.num_documents,
        "loss": f"max(0, full depth's {task.metric} - {task.metric}) of a prompt",
        "full_depth": _mean(full),
        "task": {
            "name": task.name,
            "metric": task.metric,
            "digest": task.digest(),
            "max_new_tokens": config.generation.max_new_tokens,
            "stop": config.generation.stop,
        },
        "level": first.level,
        "grid": first.grid,
        "tests": tests,
    }


def _mean(scored: list[Scored]) -> float:
    return sum(each.score for each in scored) / len(scored)


def _print_summary(
    task: Task, delta: float, confidence: float, measure: str, proof: Proof, full: list[Scored], num_layers: int
) -> None:
    tried, at = len(proof.losses), proof.num_proven - 1
    print(
        f"{tried} of {len(proof.grid)} thresholds tested on {proof.num_documents:,} prompts of {task.name}, by {measure}; full depth's "
        f"{task.metric}: {_mean(full):.1%}"
    )
    if proof.threshold is None:
        needed = documents_needed(delta, proof.level, float(proof.losses[0]))
        remedy = (
            "tune the heads longer, or raise --guarantee"
            if needed is None
            else f"about {needed:,} prompts would do for the first"
        )
        print(
            f"no threshold can be guaranteed: no token will leave early. At {proof.grid[0]:g}, the highest, {task.metric} drops by "
            f"{float(proof.losses[0]):.2%} of a prompt (p = {float(proof.p_values[0]):.2g}, and {proof.level:.2g} is needed); {remedy}"
        )
        return
    print(
        f"guaranteed, leaving from {proof.threshold:g}: on prompts like these {task.metric} drops by at most "
        f"{delta:.2%} of a prompt, in "
        f"expectation, with confidence {confidence:g}; measured: {float(proof.losses[at]):.2%}, p = {float(proof.p_values[at]):.2g}\n"
        f"{float(proof.depths[at]):.2f} of {num_layers} layers a token"
    )
