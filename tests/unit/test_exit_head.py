"""What a head computes at its beginning is known without training: these equalities hold the initialization."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exits import loaded_with, write_exits
from random_models import random_llama
from torch import Tensor

from ee_tuning.model.exit_head import ExitHead

TOKENS = torch.tensor([[5, 17, 80, 3, 9, 77, 0, 41]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_llama(folder)
    return folder


def logits(model: Path, exits: Path) -> dict[int, Tensor]:  # layer -> [s, b, v]
    """Of every exit, and of the final head under 0."""
    stage = loaded_with(model, exits, dtype="float64").model
    with torch.no_grad():
        hidden, inputs = stage.run_layers(stage.embed(TOKENS))
        final = F.linear(stage.final_hidden(hidden), stage.backbone.output_layer.weight)
        return {0: final, **{layer: stage.exit_head(layer)(inputs[layer], F.linear) for layer in inputs}}


def test_copied_mlp_head_equals_norm_head(model, tmp_path):
    """a + MLP(PreMLPNorm(a)) is layer l's own output, unless a piece was copied from the wrong layer."""
    mlp, norm = (
        logits(model, write_exits(model, tmp_path / kind, architecture=kind, init="copy", exit_layers=[1, 3, 6]))
        for kind in ("mlp", "norm")
    )
    for layer in (1, 3, 6):
        torch.testing.assert_close(mlp[layer], norm[layer], rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["adapter", "linear"])
@pytest.mark.parametrize("output", ["tied", "untied"])
def test_copied_head_that_adds_nothing_yet_equals_norm_head(model, tmp_path, output, architecture):
    """An `up` that is not 0 at copy initialization, an adapter that replaces what it should add to, a linear map that
    is drawn.
    """
    keys = {"init": "copy", "exit_layers": [1, 3, 6], "output": output}
    other, norm = (
        logits(model, write_exits(model, tmp_path / kind, architecture=kind, **keys)) for kind in (architecture, "norm")
    )
    for layer in (1, 3, 6):
        assert torch.equal(other[layer], norm[layer])


def test_copied_layer_head_after_the_last_but_one_layer_equals_the_final_head(model, tmp_path):
    """A `layer` head that copies the layer it follows, and not the last one; positions or a mask of its own."""
    got = logits(model, write_exits(model, tmp_path / "exits", architecture="layer", init="copy", exit_layers=[2, 5]))
    torch.testing.assert_close(got[5], got[0], rtol=0, atol=1e-10)
    assert (got[2] - got[0]).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["norm", "mlp", "adapter", "linear"])
@pytest.mark.parametrize("output", ["tied", "untied"])
def test_copied_head_after_the_last_layer_equals_the_final_head(model, tmp_path, architecture, output):
    """A head that copies the wrong norm, or the word embedding where the output matrix is another."""
    got = logits(
        model,
        write_exits(model, tmp_path / "exits", architecture=architecture, output=output, init="copy", exit_layers=[6]),
    )
    torch.testing.assert_close(got[6], got[0], rtol=0, atol=1e-10)


def test_random_head_is_no_copy(model, tmp_path):
    """init: random that is ignored would pass every other claim here."""
    drawn, copied = (
        logits(model, write_exits(model, tmp_path / init, init=init, exit_layers=[3])) for init in ("random", "copy")
    )
    assert (drawn[3] - copied[3]).abs().max() > 0.1


def test_a_head_must_say_what_its_output_matrix_is_applied_to():
    """An architecture that forgets it fails at the first token and not when it is built."""

    class Forgetful(ExitHead):
        pass

    with pytest.raises(TypeError, match="own_hidden"):
        Forgetful(None, None, None, dtype=None, tied_weight=None, angles=None, cuts_sequence=False)
