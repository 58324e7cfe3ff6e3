"""A stage's part of a step: rows through its segments until nobody goes on, by one call of the kernels where they
serve, else segment by segment.
"""

import itertools
import time
from collections.abc import Set
from typing import NamedTuple

import torch
from torch import Tensor

from ee_tuning.generation.route import Part, Route, waiting_within
from ee_tuning.generation.runner import Runner
from ee_tuning.generation.sequence import Sequence
from ee_tuning.kernel import calls
from ee_tuning.kernel.calls import STAYS
from ee_tuning.model.exit_head import ExitInput

# t tokens · h hidden

Word = tuple[float, float, float]
"""What a stage says of a row: its segment where the newest token left or STAYS, the likeliest token there, and its
probability.
"""


class Called(NamedTuple):
    """How far a part was run."""

    words: list[Word]
    num_run: int
    """Segments, from the part's first one on."""
    counts: list[int]
    """The number of each row's tokens whose states have to wait behind the last one of them …"""
    states: Tensor
    """… [Σ counts, h]."""
    seconds_in_heads: float


def call_part(
    runner: Runner,
    route: Route,
    part: Part,
    rows: list[Sequence],
    asked: Set[Sequence],
    entering: Tensor | None,  # [Σ counts, h]
    counts: list[int],
) -> Called:
    """Runs until no row of `asked` goes on. `counts` tokens of each row come in, the newest one last: `entering`, or
    they are embedded.
    """
    call = _by_kernels if route.segments is not None else _by_layers
    return call(
        runner,
        route,
        part,
        rows,
        asked,
        entering,
        Called([(STAYS, 0.0, 0.0)] * len(rows), 0, counts, torch.empty(0), 0.0),
    )


def fill_part(runner: Runner, route: Route, part: Part, rows: list[Sequence], before: Called) -> Called:
    """Runs from where a call ended to the part's end, with no row asked."""
    call = _by_kernels if route.segments is not None else _by_layers
    return call(runner, route, part, rows, set(), before.states, before)


def _by_kernels(
    runner: Runner,
    route: Route,
    part: Part,
    rows: list[Sequence],
    asked: Set[Sequence],
    entering: Tensor | None,
    before: Called,
) -> Called:
    waiting, num_within, _kept = waiting_within(part, rows)
    states = torch.empty(sum(before.counts) + num_within, runner.config.hidden_size, dtype=runner.model.plan.dtype)
    told = (calls.StepRow * len(rows))(
        *[
            calls.StepRow(s.tokens[-1], s.num_fed - 1, s.places.address, count, STAYS if s in asked else 0)
            for s, count in zip(rows, before.counts, strict=True)
            if s.places
        ]
    )
    step = calls.Step(
        torch.get_num_threads(),
        len(rows),
        before.num_run,
        len(part.ends),
        not asked,
        told,
        waiting,
        *(each.data_ptr() for each in runner.tables),
        None if runner.words is None else runner.words.data_ptr(),
        None if entering is None else entering.data_ptr(),
    )
    assert route.segments is not None
    calls.run_step(route.shape, route.segments, step, states)
    words = [(row.segment, *row.top) for row in told] if asked else before.words
    return Called(words, step.num_run, [row.num_carried for row in told], states, step.seconds_in_heads)


def _by_layers(
    runner: Runner,
    route: Route,
    part: Part,
    rows: list[Sequence],
    asked: Set[Sequence],
    entering: Tensor | None,
    before: Called,
) -> Called:
    words, counts, going = list(before.words), list(before.counts), [r for r, s in enumerate(rows) if s in asked]
    hidden, number, seconds_in_heads = entering, before.num_run, 0.0
    if hidden is None:
        hidden = runner.embedded(rows, [s.num_fed - 1 for s in rows], counts)
    while number < len(part.ends) and (going or not asked):
        start, end = part.starts[number], part.ends[number]
        if number:
            hidden, counts = _joined(rows, start, hidden, counts)
        starts = [s.num_fed - n for s, n in zip(rows, counts, strict=True)]
        hidden, inner = runner.layers_of(start, end)(hidden, runner.describe(rows, starts, counts))
        if part.is_asked[number] and going:
            began = time.perf_counter()
            layer = route.heads[end]
            inputs = ExitInput(hidden) if layer is None else runner.exit_heads[layer].take(hidden, inner)
            lasts = [place - 1 for place in itertools.accumulate(counts)]
            said = (
                runner.heads[layer]
                .ask(inputs if len(going) == len(hidden) else inputs.rows([lasts[r] for r in going]))[1]
                .tolist()
            )
            threshold = route.thresholds[end]
            for r, (token, confidence) in zip(going, said, strict=True):
                words[r] = (number if confidence >= threshold else STAYS, token, confidence)
            going = [r for r in going if words[r][0] == STAYS]
            seconds_in_heads += time.perf_counter() - began
        number += 1
    return Called(words, number, counts, hidden, seconds_in_heads)


def _joined(rows: list[Sequence], start: int, hidden: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    """The states with those that wait in front of piece `start`, each row's own before what came."""
    num_waiting = [s.watermarks[start - 1] - s.watermarks[start] for s in rows]
    if not any(num_waiting):
        return hidden, counts
    parts = [states for s, own in zip(rows, hidden.split(counts), strict=True) for states in (*s.boundary[start], own)]
    return torch.cat(parts), [n + m for n, m in zip(counts, num_waiting, strict=True)]
