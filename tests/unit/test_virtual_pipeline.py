"""Legacy checkpoints of virtual pipelines: each stage holds several parts of the model, which goes round the stages
more than once.
"""

from pathlib import Path

import pytest
import torch
from megatron_files import save_legacy
from random_models import random_llama

from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import ModelSection
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import read_model_config


def save_virtual(folder: Path, num_stages: int, *, is_old: bool) -> Path:
    """Six parts of one layer, laid round `num_stages` stages."""
    reference = random_llama(folder / "hf")
    save_legacy(reference, read_model_config(folder / "hf"), folder / "parts", 2, (1,) * 6, is_old=is_old)
    for rank in range(2):
        parts = [
            torch.load(folder / "parts" / f"mp_rank_{rank:02d}_{part:03d}" / "model_optim_rng.pt", weights_only=False)
            for part in range(6)
        ]
        for stage in range(num_stages):
            state = {key: value for key, value in parts[stage].items() if key != "model"}
            state.update({f"model{i}": parts[part]["model"] for i, part in enumerate(range(stage, 6, num_stages))})
            place = folder / "virtual" / f"mp_rank_{rank:02d}_{stage:03d}"
            place.mkdir(parents=True)
            torch.save(state, place / "model_optim_rng.pt")
    return folder / "virtual"


@pytest.mark.parametrize(("num_stages", "is_old"), [(3, False), (2, True)])
def test_layers_are_counted_round_the_stages(tmp_path: Path, num_stages: int, is_old: bool) -> None:
    """All of a stage's parts read one after the other: the layers of another model, in a loadable file."""
    virtual = open_model(ModelSection(path=str(save_virtual(tmp_path, num_stages, is_old=is_old))))
    plain = open_model(ModelSection(path=str(tmp_path / "hf")))
    virtual.source.check_complete(virtual.config)
    assert fingerprint(*virtual[:2]) == fingerprint(*plain[:2])


def test_a_part_that_is_missing_is_noticed(tmp_path: Path) -> None:
    """Five layers taken for the whole model, or the sixth for the fifth."""
    folder = save_virtual(tmp_path, 3, is_old=False)
    path = folder / "mp_rank_01_002" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    del state["model1"]
    torch.save(state, path)
    with pytest.raises(InputError, match="virtual pipeline"):
        open_model(ModelSection(path=str(folder)))
