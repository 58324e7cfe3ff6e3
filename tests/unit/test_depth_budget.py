"""The exit of the policy `fixed`, chosen by its measured time per token (generation.budget)."""

import pytest
from exits import loaded_with, write_exits
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.config import GenerationSection
from ee_tuning.engine.engine import Engine, TokenStep
from ee_tuning.errors import InputError
from ee_tuning.generation import depth_budget
from ee_tuning.generation.depth_budget import DepthTimes, measure_depths, with_exit_within_budget
from ee_tuning.sampling.policy import FULL


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of six layers with exits after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("budget")
    random_llama(folder / "model")
    write_exits(folder / "model", folder / "exits", exit_layers=(2, 4, 6), architecture=["norm"])
    return loaded_with(folder / "model", folder / "exits")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> DepthTimes:
    """Measured ones, in their place."""
    found = DepthTimes(0.010, {2: 0.004, 4: 0.007})
    monkeypatch.setattr(depth_budget, "measure_depths", lambda *_: found)
    return found


@pytest.mark.parametrize(("budget", "layer"), [(0.4, 2), (0.69, 2), (0.7, 4), (0.99, 4)])
def test_the_deepest_exit_within_the_budget_is_taken_and_said(
    loaded: LoadedModel, times: DepthTimes, budget: float, layer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fastest exit, or the first one above the budget."""
    options, chosen = with_exit_within_budget(loaded.model, loaded.stages, GenerationSection(budget=budget))
    assert (options.policy, options.exit_layer, options.budget, chosen) == ("fixed", layer, None, (budget, layer))
    assert f"budget {budget:g}: exit {layer} of 6 layers, {times.share(layer):.2f} of full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"budget": 0.3}, ["no exit meets a budget of 0.3", "2, takes 0.40"]),
        ({"budget": 0.0}, ["above 0 and below 1", "got 0"]),
        ({"budget": 1.0}, ["above 0 and below 1", "got 1"]),
        ({"budget": 0.5, "policy": "speculative"}, ["policy speculative", "leave one of them out"]),
        ({"budget": 0.5, "exit_layer": 4}, ["exit_layer 4", "leave one of them out"]),
    ],
)
def test_a_budget_that_can_not_be_is_refused(
    loaded: LoadedModel, times: DepthTimes, keys: dict[str, object], words: list[str]
) -> None:
    """A budget that no exit meets, which silently becomes the shallowest exit or full depth."""
    with pytest.raises(InputError) as caught:
        with_exit_within_budget(loaded.model, loaded.stages, GenerationSection(**keys))  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value


def test_every_depth_is_timed(loaded: LoadedModel) -> None:
    """An exit at the end of the model, which saves nothing."""
    times = measure_depths(loaded.model, loaded.stages)
    assert list(times.exits) == [2, 4] and times.exits[2] > 0 and 0 < times.full < 10


def test_tokens_after_the_prompt_are_timed_alone(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's time in each token's, which makes all exits look alike. Time is counted in steps here."""
    steps, step = list[int](), Engine.step

    def counted(engine: Engine) -> list[TokenStep]:
        steps.append(1)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    monkeypatch.setattr(depth_budget.time, "perf_counter", lambda: float(len(steps)))
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=41, reuses_prefixes=False)
    assert depth_budget._seconds_per_token(engine, FULL, 41) == 1.0
