"""Chooses the exit of the policy `fixed` by measured time per token: the deepest one within a share of full depth's.

Decoding itself is timed, one sequence at a time, by the engine that will serve: at any layout, with whatever kernels,
graphs and messages between stages it uses.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ee_tuning.config import GenerationSection
from ee_tuning.engine.engine import Engine
from ee_tuning.errors import InputError
from ee_tuning.generation.budget_exit import BudgetExit
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.notices import say
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

CONTEXT, NUM_TOKENS = 32, 8
"""Tokens before the timed ones, and timed tokens of a round."""
SECONDS, FEWEST, MOST = 1.0, 3, 40
"""Rounds are timed for about so long, within these numbers. The fastest one counts, for other work only adds."""


@dataclass(frozen=True)
class DepthTimes:
    """Seconds per token, measured."""

    full: float
    exits: dict[int, float]
    """Seconds per token of each exit layer, shallow to deep."""

    def share(self, layer: int) -> float:
        """The time of an exit as a share of full depth's."""
        return self.exits[layer] / self.full

    def deepest_within(self, budget: float) -> int:
        """Returns the deepest exit whose share is at most `budget`. Raises InputError where there is none."""
        fitting = [layer for layer in self.exits if self.share(layer) <= budget]
        if not fitting:
            least = min(self.exits, key=self.share)
            raise InputError(
                f"no exit meets a budget of {budget:g}: the fastest, {least}, takes {self.share(least):.2f} of full "
                f"depth's time per token; give at least that, or exits after earlier layers"
            )
        return max(fitting)


def with_exit_within_budget(
    model: EarlyExitModel,
    stages: list[tuple[int, int]],
    options: GenerationSection,
    before: BudgetExit | None = None,
) -> tuple[GenerationSection, BudgetExit | None]:
    """Returns `options` with the policy and exit that generation.budget asks for, and its choice; unchanged, and None,
    without one. Prints the choice. The one made `before` by this budget, for an output that is to go on, is not
    measured anew. `stages` are those of the engine. All ranks call it.

    Raises InputError where the other keys contradict it, or no exit meets it.
    """
    budget = options.budget
    if budget is None:
        return options, None
    if options.policy not in ("threshold", "fixed") or options.exit_layer is not None:
        given = f"policy {options.policy}" if options.exit_layer is None else f"exit_layer {options.exit_layer}"
        raise InputError(
            f"generation.budget = {budget:g} chooses the exit of the policy fixed, got {given}; leave one of them out"
        )
    chosen = {} if before is None else {before.share: before.exit_layer}
    layer = exits_within_budgets(model, stages, (budget,), chosen)[budget]
    return dataclasses.replace(options, policy="fixed", exit_layer=layer, budget=None), BudgetExit(budget, layer)


def exits_within_budgets(
    model: EarlyExitModel, stages: list[tuple[int, int]], budgets: Sequence[float], chosen: Mapping[float, int]
) -> dict[float, int]:
    """Returns the exit of each budget, and prints it. Those that were `chosen` before are not measured again. All ranks
    call it.

    Raises InputError where a budget is out of range, or no exit meets it.
    """
    early, num_layers, times = early_exits(model), model.config.num_layers, None
    found = {}
    for budget in budgets:
        check_budget(budget)
        if not early:
            raise InputError(
                f"a budget of {budget:g} chooses among exits before the last layer, got none; give --exits FOLDER"
            )
        layer = chosen.get(budget)
        if layer in early:
            sentence = f"exit {layer} of {num_layers} layers, with which the output began; not measured again"
        else:
            times = times or measure_depths(model, stages)
            layer = times.deepest_within(budget)
            sentence = _sentence(layer, times, num_layers)
        found[budget] = layer
        if model.topology.is_logging_rank:
            say(f"ee-tuning: budget {budget:g}: {sentence}")
    return found


def check_budget(budget: float) -> None:
    """Raises InputError where a budget is out of range."""
    if not 0 < budget < 1:
        raise InputError(
            f"a budget (--budget, generation.budget) must be above 0 and below 1, a share of full depth's time per token, got {budget:g}"
        )


def early_exits(model: EarlyExitModel) -> list[int]:
    """Returns the exits before the last layer."""
    return [layer for layer in model.plan.exit_layers if layer < model.config.num_layers]


def measure_depths(model: EarlyExitModel, stages: list[tuple[int, int]]) -> DepthTimes:
    """Times decoding at full depth and at each early exit. All ranks call it, and get rank 0's times."""
    policies = {0: FULL, **{layer: Policy(fixed_exit=layer) for layer in early_exits(model)}}
    length = min(CONTEXT + NUM_TOKENS + 1, model.config.max_position_embeddings)
    engine = Engine(model, stages, num_slots=1, max_length=length, reuses_prefixes=False)

    def time_all() -> dict[int, float]:
        return {layer: _seconds_per_token(engine, policy, length) for layer, policy in policies.items()}

    time_all()  # compiles and allocates
    rounds = [time_all()]
    needed = int(SECONDS / (NUM_TOKENS * sum(rounds[0].values())))
    needed = model.topology.broadcast_object(min(max(needed, FEWEST), MOST))
    rounds += [time_all() for _ in range(needed - 1)]
    fastest = {layer: min(each[layer] for each in rounds) for layer in policies}
    fastest = model.topology.broadcast_object(fastest)
    return DepthTimes(fastest.pop(0), fastest)


def _seconds_per_token(engine: Engine, policy: Policy, length: int) -> float:
    params = SamplingParams(max_tokens=NUM_TOKENS + 1, min_tokens=NUM_TOKENS + 1, ignore_eos=True)
    engine.add_request([0] * (length - NUM_TOKENS - 1), params, policy)
    while not (steps := engine.step()):
        pass  # the prompt
    began, count = time.perf_counter(), len(steps)
    while not engine.is_idle:
        count += len(engine.step())
    return (time.perf_counter() - began) / max(count - 1, 1)


def _sentence(layer: int, times: DepthTimes, num_layers: int) -> str:
    line = (
        f"exit {layer} of {num_layers} layers, {times.share(layer):.2f} of full depth's time "
        f"per token ({times.exits[layer] * 1000:.2f} of {times.full * 1000:.2f} ms)"
    )
    deeper = [each for each in times.exits if each > layer]
    return line + (
        f"; exit {min(deeper)} takes {times.share(min(deeper)):.2f}" if deeper else "; it is the deepest one"
    )
