"""Losses of thresholds on a task, for a guarantee (`guarantee.py`): how far a prompt's score falls below full depth's.

Every threshold costs a completion of each prompt. A sequence of tests ends at its first failure, so thresholds are
tried from the most careful one on, and those after the failure are not decoded.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ee_tuning.calibration.guarantee import Trials, hoeffding_bentkus
from ee_tuning.config.generation import Measure
from ee_tuning.evaluation.evaluate import BlockRunner, Procedure
from ee_tuning.evaluation.given import given_readings
from ee_tuning.evaluation.points import FULL_DEPTH, Point, PolicySweep, points_of
from ee_tuning.evaluation.task import Task
from ee_tuning.evaluation.text_metrics import score_of
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.replicas import over_replicas

GRID: tuple[float, ...] = (0.99, *(round(0.95 - 0.05 * step, 2) for step in range(19)))
"""Thresholds, most careful first: 0.99, 0.95, 0.9 … 0.05."""


class Scored(NamedTuple):
    """A prompt at one threshold."""

    score: float
    depth: float
    """Mean number of layers of its tokens."""


class TaskScores:
    """Scores a task's prompts under one policy after the other."""

    def __init__(self, llm: EarlyExitLLM, task: Task, chat_template: str | None = None):
        """Raises InputError, naming its line, on an unusable prompt."""
        self.llm, self.task = llm, task
        runner = BlockRunner(
            llm, [FULL_DEPTH], Procedure(batch_size=llm.defaults.max_batch_size, chat_template=chat_template)
        )
        self.options, self._jobs = runner.options, runner.jobs_of(task)

    def by(self, point: Point) -> list[Scored]:
        """Returns a score for each prompt, on every rank."""
        return over_replicas(range(len(self._jobs)), lambda share: self._share(point, share), self.llm.model.topology)

    def _share(self, point: Point, places: list[int]) -> list[Scored]:
        if (metric := self.task.text_metric) is None:
            readings = [reading for (reading,) in given_readings(self.llm, self.task, places, self._jobs, [point])]
            return [
                Scored(
                    each.scores[self.task.metric],
                    sum(layer * count for layer, count in each.exits.items()) / each.num_tokens,
                )
                for each in readings
            ]
        said, score = list[Completion](), score_of(metric)
        jobs: list[Job] = [dataclasses.replace(self._jobs[place], policy=point.policy) for place in places]
        for _ in self.llm.run(jobs, said, self.options, shows_text=False):
            pass
        return [
            Scored(score(each.text, self.task.items[place].answers), each.mean_depth)
            for place, each in zip(places, said, strict=True)
        ]


def try_on_task(
    scores: TaskScores,
    full: Sequence[Scored],
    measure: Measure,
    grid: Sequence[float],
    delta: float,
    level: float,
    on_threshold: Callable[[float, float, float], None] = lambda threshold, loss, p_value: None,
) -> Trials:
    """Applies the thresholds of `grid` to each prompt, up to the first whose test fails at `level`.

    `full` holds full depth's scores. `on_threshold` gets each threshold's mean loss and p-value.
    """
    losses, depths = list[list[float]](), list[list[float]]()
    for threshold in grid:
        _, point = points_of(scores.llm, PolicySweep(thresholds=(threshold,)), measure=measure)
        found = scores.by(point)
        losses.append([max(0.0, own.score - early.score) for own, early in zip(full, found, strict=True)])
        depths.append([early.depth for early in found])
        total = torch.tensor(sum(losses[-1]), dtype=torch.float64)
        p_value = float(hoeffding_bentkus(total, len(full), delta))
        on_threshold(threshold, float(total) / len(full), p_value)
        if p_value > level:
            break
    return Trials(torch.tensor(losses, dtype=torch.float64).T, torch.tensor(depths, dtype=torch.float64).T)
