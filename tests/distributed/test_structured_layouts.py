"""Every layout TP × PP says within a form what one process says."""

from pathlib import Path
from typing import Any

import pytest
from formed import FORMS, open_model, write_model

from ee_tuning import SamplingParams

pytest.importorskip("llguidance", reason="pip install 'ee_tuning[structured]'")

WAYS: tuple[dict[str, Any], ...] = (
    {"threshold": [0.05]},
    {"threshold": [0.02], "measure": "margin"},
    {"policy": "speculative"},
    {"policy": "fixed", "exit_layer": 2},
    {"policy": "full"},
)
PARAMS = [
    SamplingParams(max_tokens=40, structured_output=form, temperature=temperature, n=n, seed=7, logprobs=2)
    for form, _ in FORMS.values()
    for temperature, n in ((0.0, 1), (1.2, 2))
]


def answers_at(model: str, exits: str, tp: int, pp: int) -> list[tuple[list[int], list[int], str]]:
    """The tokens of each answer, the layers they left at where that is no matter of measured time, and the reason."""
    sizes = {"parallel.tensor_model_parallel_size": tp, "parallel.pipeline_model_parallel_size": pp}
    llm = open_model(Path(model), Path(exits), **sizes)
    made = []
    for way in WAYS:
        for answer in llm.generate([f"{place}: " for place in range(len(PARAMS))], PARAMS, **way, cache_tokens=384):
            layers = [] if way.get("policy") == "speculative" else answer.exit_layers
            made.append((answer.token_ids, layers, answer.finish_reason))
    return made


@pytest.mark.parametrize("listed", [(), tuple(range(60, 257))], ids=["all", "shortlist"])
def test_layouts_say_the_same_within_a_form(world: Any, tmp_path: Path, listed: tuple[int, ...]) -> None:
    """Ranks of which one computed a mask and another none, and that disagree on where an answer ends; a mask over a
    shard of the vocabulary.
    """
    model, exits = map(str, write_model(tmp_path, listed))
    wanted = answers_at(model, exits, 1, 1)
    for answer in world.run(answers_at, model, exits, 2, 2):
        assert answer == wanted
