"""Inputs and outputs of `ee-tuning calibrate --guarantee DELTA --task FILE --metric M`. `guarantee.py` runs the
tests.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from ee_tuning.calibration.calibrate import MEASURES, check_has_exits
from ee_tuning.calibration.guarantee import Guarantee, Proof, earliest, guarantee_tree, prove, remedy_text
from ee_tuning.calibration.guarantee_picture import PictureLabels, draw_guarantee
from ee_tuning.calibration.task_losses import GRID, Scored, TaskScores, try_on_task
from ee_tuning.config import Config, replace
from ee_tuning.config.generation import Measure
from ee_tuning.data.chat_template import read_chat_template
from ee_tuning.errors import InputError
from ee_tuning.evaluation.calibration_file import write_calibration
from ee_tuning.evaluation.points import FULL_DEPTH, check_thresholds
from ee_tuning.evaluation.task import Task, read_task
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

CONFIDENCE = 0.95
_BOUNDED = ("exact", "contains", "rouge-l", "choice")


def calibrate_on_task(config: Config, flags: argparse.Namespace, topology: Topology, picture: Path) -> None:
    """Measures, writes `flags.output` and its picture, and prints the result.

    Raises InputError, before the model is loaded, on an unusable task, metric or grid, and where prompts are too few.
    """
    asked = Guarantee(
        flags.guarantee,
        CONFIDENCE if flags.confidence is None else flags.confidence,
        MEASURES if flags.measure == "best" else (flags.measure or "max_probability",),
    )
    grid = tuple(sorted(flags.thresholds, reverse=True)) if flags.thresholds else GRID
    task: Task = on_first_rank(topology, lambda: _read(flags, grid))
    _check_number(len(task.items), asked)
    llm = EarlyExitLLM.from_config(replace(config, generation={"budget": None}), topology)
    check_has_exits(llm.exit_layers, llm.num_layers)
    scores = TaskScores(llm, task, read_chat_template(config.data.chat_template))
    full, level = scores.by(FULL_DEPTH), asked.epsilon / len(asked.measures)

    def progress_line(threshold: float, loss: float, p_value: float) -> None:
        if topology.is_logging_rank:
            say(f"threshold {threshold:g}: {task.metric} drops by {loss:.2%} of a prompt, p = {p_value:.2g}")

    proofs = prove(
        {
            measure: try_on_task(scores, full, measure, grid, asked.delta, level, progress_line)
            for measure in asked.measures
        },
        asked.delta,
        asked.epsilon,
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
            "guarantee": _tree(config, task, asked, proofs, full),
        },
    )
    draw_guarantee(
        proofs,
        measure,
        asked.delta,
        picture,
        PictureLabels(loss=f"Drop of {task.metric} below full depth's", of="of a prompt, %", units="prompts"),
    )
    _print_summary(task, asked, measure, proofs[measure], full, llm.num_layers)


def _read(flags: argparse.Namespace, grid: tuple[float, ...]) -> Task:
    if flags.metric not in _BOUNDED:
        raise InputError(
            f"--metric must be one whose score lies in 0..1, {', '.join(_BOUNDED)}, got {flags.metric or 'none'}"
        )
    check_thresholds(grid)
    if len(set(grid)) < len(grid):
        raise InputError("--thresholds must be different, got one twice; leave it out")
    return read_task(flags.task, flags.metric)


def _check_number(num_prompts: int, asked: Guarantee) -> None:
    if num_prompts < asked.num_needed:
        raise InputError(
            f"--guarantee {asked.delta:g} with --confidence {asked.confidence:g} needs at least {asked.num_needed:,} prompts, "
            f"even where no score ever drops, got {num_prompts:,}; give a task with more"
        )


def _tree(
    config: Config, task: Task, asked: Guarantee, proofs: Mapping[Measure, Proof], full: list[Scored]
) -> dict[str, object]:
    """Returns the guarantee for the calibration file."""
    return {
        **guarantee_tree(asked, proofs),
        "prompts": len(task.items),
        "loss": f"max(0, full depth's {task.metric} - {task.metric}) of a prompt",
        "full_depth": _mean(full),
        "task": {
            "name": task.name,
            "metric": task.metric,
            "digest": task.digest(),
            "max_new_tokens": config.generation.max_new_tokens,
            "stop": config.generation.stop,
        },
    }


def _mean(scored: list[Scored]) -> float:
    return sum(each.score for each in scored) / len(scored)


def _print_summary(
    task: Task, asked: Guarantee, measure: str, proof: Proof, full: list[Scored], num_layers: int
) -> None:
    tried, at = len(proof.losses), proof.num_proven - 1
    print(
        f"{tried} of {len(proof.grid)} thresholds tested on {proof.num_documents:,} prompts of {task.name}, by {measure}; full depth's "
        f"{task.metric}: {_mean(full):.1%}"
    )
    if proof.threshold is None:
        print(
            f"no threshold can be guaranteed: no token will leave early. At {proof.grid[0]:g}, the highest, {task.metric} drops by "
            f"{float(proof.losses[0]):.2%} of a prompt (p = {float(proof.p_values[0]):.2g}, and {proof.level:.2g} is needed); "
            f"{remedy_text(asked, proof, 'prompts')}"
        )
        return
    print(
        f"guaranteed, leaving from {proof.threshold:g}: on prompts like these {task.metric} drops by at most "
        f"{asked.delta:.2%} of a prompt, in "
        f"expectation, with confidence {asked.confidence:g}; measured: {float(proof.losses[at]):.2%}, p = {float(proof.p_values[at]):.2g}\n"
        f"{float(proof.depths[at]):.2f} of {num_layers} layers a token"
    )
