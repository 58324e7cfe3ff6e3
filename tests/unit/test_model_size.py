"""Sizes from shapes: what plans for models that nobody has fetched stand on."""

import json
from pathlib import Path
from typing import Any

import pytest
from llama_70b import config_only
from random_models import FAMILIES, random_model

from ee_tuning import cli
from ee_tuning.checkpoint.model_size import parameters_by_part, parameters_per_layer, tensor_parts
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.model_config.config import read_model_config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "parameters"),
    [({"vocab_size": 32000}, 68_976_648_192), ({"vocab_size": 128256, "rope_theta": 500000.0}, 70_553_706_496)],
    ids=["Llama-2-70B", "Llama-3.1-70B"],
)
def test_a_config_alone_tells_the_published_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], parameters: int
) -> None:
    """A projection counted by query heads where keys have fewer; an output matrix forgotten, or a refusal for want of
    140 GB.
    """
    config_only(tmp_path, torch_dtype="bfloat16", **changes)
    assert cli.main(["inspect", "--model", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    vocabulary = changes["vocab_size"] * 8192
    assert (
        facts["parameters"]["all"] == parameters and facts["bytes"] == 2 * parameters and "missing" in facts["format"]
    )
    assert facts["parameters"]["output"] == vocabulary and facts["parameters"]["norms"] == 161 * 8192
    assert facts["one_exit_head_bytes"]["mlp, untied"] == 2 * (vocabulary + 3 * 8192 * 28672 + 8192)
    assert facts["largest_group_bytes"] == 2 * max(vocabulary, facts["parameters"]["each layer"]["all"])
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert f"{parameters:,}" in capsys.readouterr().out and "fingerprint" not in facts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_has_its_part(tmp_path: Path, family: str) -> None:
    """Parts that do not sum to the model: a bias or a router in none, a fused matrix in two."""
    reference = random_model(family, tmp_path)
    config = read_model_config(tmp_path)
    parts = parameters_by_part(config)
    assert tensor_parts(config).keys() == backbone_tensor_shapes(config).keys()
    assert parts["all"] == sum(parameter.numel() for parameter in reference.parameters())
    layers = parameters_per_layer(config)
    if len(layers) == 1:
        assert config.num_layers * layers["each layer"]["all"] < parts["all"]
        assert config.num_layers * layers["each layer"]["mlp"] == parts["mlp"]
