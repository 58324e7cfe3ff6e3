"""Models with experts in Megatron-core's distributed checkpoints: what stock Megatron-core wrote is read, and it loads
what is exported.
"""

from pathlib import Path

import pytest
import torch
from exits import write_exits
from megatron_files import save_stock_model, stock_model, stock_parameters
from random_models import WITH_EXPERTS, random_model
from test_ways_in import differing
from world import World

from ee_tuning.artifact.inspect import model_facts
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.checkpoint.huggingface import HuggingFaceReader, read_backbone_tensor
from ee_tuning.config import ModelSection, ParallelSection, load_config
from ee_tuning.export.megatron_writer import write_megatron
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel


def write(model: str, exits: str, output: str) -> None:
    write_megatron(
        load_config(None, {"model.path": model, "exits.path": exits}), Path(output), init_parallel(ParallelSection())
    )


def wrongly_loaded(model: str, exported: str, tp: int, pp: int) -> tuple[int, list[str]]:
    """How many parameters a stock GPTModel has here, and those that it loads otherwise than the Hugging Face folder has
    them.
    """
    from megatron.core import dist_checkpointing

    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    config = read_model_config(Path(model))
    stock = stock_model(config, topology, config.padded_vocab_size(tp))
    stock.load_state_dict(dist_checkpointing.load({"model": stock.sharded_state_dict()}, exported)["model"])
    parameters = list(stock_parameters(stock))
    with HuggingFaceReader(Path(model)) as reader:
        wanted = {
            name: read_backbone_tensor(reader, config, name, tp, topology.tp_rank, torch.float32)
            for name, _ in parameters
        }
    return len(parameters), [name for name, parameter in parameters if not torch.equal(parameter, wanted[name])]


@pytest.mark.parametrize(
    ("family", "metadata"), [("mixtral", None), ("qwen3_moe", None), ("mixtral", {"singleton_local_shards": True})]
)
def test_a_stock_checkpoint_is_read_at_another_layout(
    world: World, tmp_path: Path, family: str, metadata: dict[str, bool] | None
) -> None:
    """An expert taken for its neighbour, or a layer's for another layer's; exits that are refused on the other
    format.
    """
    random_model(family, tmp_path / "model")
    stock = tmp_path / "stock"
    world.run(save_stock_model, str(tmp_path / "model"), str(stock), 2, 2, metadata, True)
    assert world.run(differing, str(tmp_path / "model"), str(stock), 2, 1) == [[]] * 4
    ours, theirs = model_facts(stock), model_facts(tmp_path / "model")
    assert ours["fingerprint"] == theirs["fingerprint"] and ours["shape"] == theirs["shape"]


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_stock_megatron_loads_what_is_exported(world: World, tmp_path: Path, family: str) -> None:
    """Keys or stacks that only our own reader understands."""
    random_model(family, tmp_path / "model", vocab_size=102)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="layer", init="copy")
    world.run(write, str(tmp_path / "model"), str(exits), str(tmp_path / "export"))
    for count, wrong in world.run(wrongly_loaded, str(tmp_path / "model"), str(tmp_path / "export"), 2, 2):
        assert count > 20 and not wrong
    source, config, _ = open_model(ModelSection(path=str(tmp_path / "export")))
    source.check_complete(config)
    assert config == read_model_config(tmp_path / "model")
