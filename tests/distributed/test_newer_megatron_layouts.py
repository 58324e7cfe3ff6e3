"""What newer releases of Megatron-core write is the same model: HybridModel, and torch_dcp from several ranks."""

from pathlib import Path

import pytest
from dcp_files import save_torch_dcp
from hybrid_files import save_hybrid_model
from random_models import random_llama
from test_ways_in import differing
from world import World

from ee_tuning.artifact.inspect import model_facts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_llama(folder, num_attention_heads=8, num_key_value_heads=4)
    return folder


def test_a_hybrid_model_of_two_stages_is_the_same_model(world: World, model: Path, tmp_path: Path) -> None:
    """Layers that count attention and MLP apart, read as twice as many blocks or as one another's."""
    world.run(save_hybrid_model, str(model), str(tmp_path / "hybrid"), 2, 2)
    assert world.run(differing, str(model), str(tmp_path / "hybrid"), 2, 1) == [[]] * 4
    ours, theirs = model_facts(tmp_path / "hybrid"), model_facts(model)
    assert ours["fingerprint"] == theirs["fingerprint"] and ours["shape"] == theirs["shape"]


def test_shards_of_four_ranks_are_the_same_model(world: World, model: Path, tmp_path: Path) -> None:
    """Arguments that are looked for in common.pt alone; rows of the wrong rank; shards without a row."""
    world.run(save_torch_dcp, str(model), str(tmp_path / "dcp"))
    assert not (tmp_path / "dcp" / "common.pt").exists()
    assert world.run(differing, str(model), str(tmp_path / "dcp"), 2, 2) == [[]] * 4
    assert model_facts(tmp_path / "dcp")["fingerprint"] == model_facts(model)["fingerprint"]
