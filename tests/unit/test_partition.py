"""Which layers a stage gets: the split is the best there is, and the costs it is made by are those of the code."""

import itertools
import json
from pathlib import Path

import pytest
import torch.distributed as dist

from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model.partition import exit_head_cost, layer_cost, split_layers, stage_layers
from ee_tuning.model_config.config import model_config_from_hf
from ee_tuning.parallel.topology import destroy_parallel
from ee_tuning.planning.dry_run import profile_ranks

pytestmark = pytest.mark.slow

SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("exits", [(), (3,), (2, 4, 7), (1, 2), (10,)])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_the_dearest_stage_is_as_cheap_as_can_be(exits: tuple[int, ...], num_stages: int) -> None:
    """A relay is as fast as its slowest stage."""
    costs = [1.0 + 1.7 * (layer in exits) for layer in range(1, 11)]
    stages = split_layers(costs, num_stages)
    assert [layer for first, last in stages for layer in range(first, last + 1)] == list(range(1, 11))
    dearest = max(sum(costs[first - 1 : last]) for first, last in stages)
    cuts = (
        tuple(itertools.pairwise((0, *middle, 10))) for middle in itertools.combinations(range(1, 10), num_stages - 1)
    )
    assert dearest == pytest.approx(min(max(sum(costs[a:b]) for a, b in each) for each in cuts))


@pytest.mark.parametrize(
    ("architecture", "output"),
    [
        ("mlp", "untied"),
        ("mlp", "tied"),
        ("norm", "untied"),
        ("norm", "tied"),
        ("embedding", "untied"),
        ("adapter", "tied"),
        ("linear", "tied"),
        ("linear", "untied"),
        ("layer", "untied"),
    ],
)
def test_modelled_costs_are_what_the_code_does(architecture: str, output: str, tmp_path: Path) -> None:
    """A head that is cheaper or dearer than the model of it says makes every other stage wait."""
    if dist.is_initialized():
        destroy_parallel()
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (profile,) = profile_ranks(
        load_config(
            None,
            {
                "model.path": str(tmp_path),
                "exits.exit_layers": [4],
                "exits.architecture": architecture,
                "exits.output": output,
                "exits.adapter_rank": 64,
                "exits.init": "copy",
                "tuning.seq_length": 256,
                "tuning.micro_batch_size": 2,
                "tuning.global_batch_size": 2,
            },
        ),
        1,
    )
    model = model_config_from_hf(SHAPE, tmp_path)
    spec = ExitSpec(layer=4, architecture=architecture, ties_output=output == "tied", adapter_rank=64)  # type: ignore[arg-type]
    tokens = 2 * 256
    assert profile.layer_flops == pytest.approx(2 * tokens * 4 * layer_cost(model, 1, 256), rel=1e-3)
    assert profile.head_flops == pytest.approx(2 * tokens * exit_head_cost(model, spec, 256, trains=True), rel=0.05)


def test_a_layout_that_is_given_is_taken() -> None:
    """Stages by another count than the one asked for would load other layers than the user's plan has."""
    assert stage_layers((2, 3, 1), [1.0] * 6, 3) == [(1, 2), (3, 5), (6, 6)]
    assert stage_layers((0, 6), [1.0] * 6, 2) == [(1, 0), (1, 6)]
    for wrong in ((2, 4), (2, 3, 2), (3, 0, 3), (-1, 4, 3), (0, 0, 6)):
        with pytest.raises(InputError, match=r"pipeline_layout must give each of the 3 stages .* 6 in all"):
            stage_layers(wrong, [1.0] * 6, 3)


def test_a_first_stage_with_the_embedding_alone_runs(tmp_path: Path) -> None:
    """A stage without layers has nothing to take a hidden state from but the embedding."""
    if dist.is_initialized():
        destroy_parallel()
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    first, second = profile_ranks(
        load_config(
            None,
            {
                "model.path": str(tmp_path),
                "exits.exit_layers": [4],
                "parallel.pipeline_model_parallel_size": 2,
                "parallel.pipeline_layout": [0, 4],
                "tuning.seq_length": 32,
            },
        ),
        2,
    )
    assert (
        first.memory["weights"] == pytest.approx(4000 * 256 * 2, rel=0.01)
        and first.layer_flops == 0
        and second.layers == ((1, 4),)
    )
