"""A checkpoint that stock Megatron-core wrote at TP2 × PP2 is the Hugging Face model at every layout."""

from pathlib import Path

import pytest
import torch
from megatron_files import save_stock_model
from random_models import random_llama
from world import World

from ee_tuning.artifact.inspect import model_facts
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import ModelSection, ParallelSection, load_config
from ee_tuning.parallel.topology import init_parallel

# What stock Megatron-core can be told to write: layers stacked or apart, halves of the gated MLP together or apart.
LAYOUTS = {
    "stacked": (None, True),
    "apart": ({"non_homogeneous_layers": True}, True),
    "halves": ({"singleton_local_shards": True}, True),
    "local names": (None, False),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_llama(folder, num_attention_heads=8, num_key_value_heads=4)
    return folder


@pytest.fixture(scope="module")
def stock(world: World, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one iteration, saved at TP2 × PP2."""
    run = tmp_path_factory.mktemp("run")
    world.run(save_stock_model, str(model), str(run / "iter_0000100"), 2, 2, *LAYOUTS["stacked"])
    (run / "latest_checkpointed_iteration.txt").write_text("100\n")
    return run


def differing(model: str, megatron: str, tp: int, pp: int) -> list[str]:
    """Parameters of this rank's stage that differ by a bit, and how many there are."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    wanted, got = (
        dict(load_for_generation(load_config(None, {"model.path": path}), topology).model.backbone.named_parameters())
        for path in (model, megatron)
    )
    assert wanted.keys() == got.keys() and len(wanted) > 5
    return [name for name in wanted if not torch.equal(wanted[name], got[name])]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1)])
def test_a_stock_checkpoint_is_read_at_every_layout(world: World, model: Path, stock: Path, tp: int, pp: int) -> None:
    """A slice cut along the writer's layout; queries, keys and values of another order; rows of padding taken for
    tokens.
    """
    assert world.run(differing, str(model), str(stock), tp, pp) == [[]] * 4


@pytest.mark.parametrize("layout", ["apart", "halves", "local names"])
def test_every_layout_of_keys_is_the_same_model(world: World, model: Path, tmp_path: Path, layout: str) -> None:
    """Names of one layer spec alone, or layers that stand apart and are not found."""
    world.run(save_stock_model, str(model), str(tmp_path / "saved"), 2, 2, *LAYOUTS[layout])
    source, config, kind = open_model(ModelSection(path=str(tmp_path / "saved")))
    reference = open_model(ModelSection(path=str(model)))
    source.check_complete(config)
    assert kind == "megatron"
    for name in reference.source.names():  # type: ignore[attr-defined]
        size, *width = source.shape(name)
        assert torch.equal(source.rows(name, 0, size), reference.source.rows(name, 0, size)), name
        if width:
            assert torch.equal(source.columns(name, 3, 19), reference.source.columns(name, 3, 19)), name
            assert torch.equal(source.rows(name, 7, min(23, size)), reference.source.rows(name, 7, min(23, size))), name


def test_one_model_has_one_fingerprint(model: Path, stock: Path) -> None:
    """Exits tuned on the one format that are refused on the other."""
    ours, theirs = model_facts(stock), model_facts(model)
    assert ours["fingerprint"] == theirs["fingerprint"] and ours["parameters"] == theirs["parameters"]
    assert "distributed" in ours["format"] and ours["name"] == stock.name
