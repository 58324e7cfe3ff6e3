"""EE-LLM's checkpoints, made from its documented names: backbone and exits come out of one folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_files import save_legacy
from random_models import random_llama

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import ModelSection, ParallelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel

TUNED = {
    "exit_layer_nums": [2, 5],
    "exit_layer_weight": [1.0, 1.0],
    "exit_layer_temperature": [1.0, 2.0],
    "pre_exit": False,
    "untie_exit_output_weights": True,
    "use_exit_mlp": True,
    "use_exit_norm": True,
    "use_exit_block": False,
}
SHAPES = {"norm": (48,), "gate": (88, 48), "up": (88, 48), "down": (48, 88), "output": (101, 48)}
NAMES = {"norm": "norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "output": "output"}


def save(
    folder: Path, tp: int, stages: tuple[int, ...], numbers: tuple[int, ...] = (2, 5), **changes: Any
) -> dict[int, dict[str, torch.Tensor]]:
    """A Hugging Face folder `hf`, and `ee_llm` with the same weights and random exits under EE-LLM's numbers, which are
    returned.
    """
    reference = random_llama(folder / "hf")
    exits = {number: {part: torch.randn(shape) for part, shape in SHAPES.items()} for number in numbers}
    save_legacy(
        reference,
        read_model_config(folder / "hf"),
        folder / "ee_llm",
        tp,
        stages,
        is_old=True,
        exits=exits,
        **{**TUNED, "exit_layer_nums": list(numbers), **changes},
    )
    return exits


def converted(folder: Path, **keys: Any) -> Path:
    config = load_config(None, {"model.path": str(folder / "ee_llm"), **keys})
    write_initial_exits(config, folder / "exits", init_parallel(ParallelSection()))
    return folder / "exits"


@pytest.mark.parametrize(("tp", "stages"), [(1, (6,)), (2, (6,)), (2, (3, 3)), (1, (1, 5))])
def test_exits_come_out_as_they_were_tuned(tmp_path: Path, tp: int, stages: tuple[int, ...]) -> None:
    """Exit outputs counted over all stages instead of within one; trunk and branch confused; halves of a shard merged
    wrongly.
    """
    exits = save(tmp_path, tp, stages)
    with ExitHeadsReader(converted(tmp_path)) as artifact:
        assert "as EE-LLM tuned them" in (artifact.folder / "README.md").read_text()
        assert artifact.config.exit_layers == (2, 5) and artifact.config.architecture == ("mlp", "mlp")
        assert artifact.config.output == "untied"
        assert artifact.config.tuned is not None and artifact.config.tuned["exit_layer_temperature"] == [1.0, 2.0]
        for number, parts in exits.items():
            for part, tensor in parts.items():
                assert torch.equal(artifact.full(f"exits.{number}.{NAMES[part]}.weight"), tensor), (number, part)
        wanted = open_model(ModelSection(path=str(tmp_path / "hf")))
        assert artifact.config.model_fingerprint == fingerprint(*wanted[:2])
        artifact.check_complete(wanted.config)


def test_an_exit_before_a_layer_sits_after_the_one_below(tmp_path: Path) -> None:
    """pre_exit heads attached one layer too deep; a branch that EE-LLM never ran before its layer taken for the head's
    MLP.
    """
    exits = save(tmp_path, 2, (3, 3), (3, 4), pre_exit=True)
    with ExitHeadsReader(converted(tmp_path)) as artifact:
        assert artifact.config.exit_layers == (2, 3) and artifact.config.architecture == ("norm", "norm")
        for number, parts in exits.items():
            assert torch.equal(artifact.full(f"exits.{number - 1}.norm.weight"), parts["norm"])
            assert torch.equal(artifact.full(f"exits.{number - 1}.output.weight"), parts["output"])


def test_an_exit_may_have_a_layer_of_its_own(tmp_path: Path) -> None:
    """The block's shards merged in another order than the backbone's; its names mistaken for the layer's that it hangs
    on.
    """
    reference = random_llama(tmp_path / "hf")
    exits = {
        number: {"norm": torch.randn(48), "output": torch.randn(101, 48), "block": torch.tensor(1)} for number in (2, 3)
    }
    save_legacy(
        reference,
        read_model_config(tmp_path / "hf"),
        tmp_path / "ee_llm",
        2,
        (6,),
        is_old=True,
        exits=exits,
        **{**TUNED, "exit_layer_nums": [2, 3], "use_exit_mlp": False, "use_exit_block": True},
    )
    with ExitHeadsReader(converted(tmp_path)) as artifact:
        assert artifact.config.architecture == ("layer", "layer")
        artifact.check_complete(open_model(ModelSection(path=str(tmp_path / "hf"))).config)
        for name, tensor in reference.model.layers[1].state_dict().items():
            assert torch.equal(artifact.full(f"exits.3.layer.{name}"), tensor), name
        assert torch.equal(artifact.full("exits.2.norm.weight"), exits[2]["norm"])


def test_an_exit_may_be_an_output_matrix_alone(tmp_path: Path) -> None:
    """A norm that is not there asked for, or the final one taken in its place."""
    reference = random_llama(tmp_path / "hf")
    exits = {2: {"output": torch.randn(101, 48)}}
    save_legacy(
        reference,
        read_model_config(tmp_path / "hf"),
        tmp_path / "ee_llm",
        1,
        (6,),
        is_old=True,
        exits=exits,
        **{**TUNED, "exit_layer_nums": [2], "use_exit_mlp": False, "use_exit_norm": False},
    )
    with ExitHeadsReader(converted(tmp_path)) as artifact:
        assert artifact.config.architecture == ("embedding",) and artifact.names() == ["exits.2.output.weight"]
        assert torch.equal(artifact.full("exits.2.output.weight"), exits[2]["output"])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_exit_block": True}, "use_exit_block"),
        ({"use_exit_norm": False}, "use_exit_norm"),
        ({"exit_layer_nums": []}, "--exit-layers"),
        ({"exit_layer_nums": [2, 9]}, "1..6"),
        ({"exit_layer_nums": [2, 4]}, "decoder.layers.3"),
        ({"untie_exit_output_weights": False}, "output matrices"),
    ],
)
def test_exits_of_another_build_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    """A head read as one that it is not."""
    save(tmp_path, 1, (6,), **changes)
    with pytest.raises(InputError) as error:
        converted(tmp_path)
    assert word in str(error.value) and not (tmp_path / "exits").exists()


def test_new_exits_can_be_asked_for_instead(tmp_path: Path) -> None:
    """A folder that holds exits and can no longer be converted like any other."""
    save(tmp_path, 1, (6,), use_exit_block=True)
    with ExitHeadsReader(converted(tmp_path, **{"exits.exit_layers": [3]})) as artifact:
        assert artifact.config.exit_layers == (3,) and artifact.config.init == "copy"


def test_keys_of_new_exits_are_shown_as_they_were_typed(tmp_path: Path) -> None:
    """Parentheses of Python in the refusal of --aux-layers 2,5."""
    save(tmp_path, 1, (6,))
    with pytest.raises(InputError, match=r"exits\.aux_layers = 2,5 is for new exits"):
        converted(tmp_path, **{"exits.aux_layers": [2, 5]})
