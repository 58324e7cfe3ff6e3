"""Frozen weights in 8 and 4 bits: how far off they may be, what they take, and that the heads do not learn of it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_llama, random_model
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel, load_for_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.model.quantized_linear import QuantizedLinear, quantized_weights
from ee_tuning.parallel.topology import destroy_parallel, init_parallel
from ee_tuning.planning.dry_run import profile_ranks

pytestmark = pytest.mark.slow

FORMATS = ("int8", "nf4")
NF4_GAP = 1 - 0.6961928
"""Between the two neighbours among NF4's sixteen values that are farthest apart (-1 and the next; QLoRA, appendix E).
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_llama(
        folder, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3, initializer_range=0.06
    )
    return folder


def job(model: Path, weights: str, **keys: Any) -> Config:
    return load_config(
        None,
        {
            "model.path": str(model),
            "exits.exit_layers": [1, 3],
            "tuning.backbone_weights": weights,
            "tuning.seq_length": 32,
            **keys,
        },
    )


def load(config: Config) -> LoadedModel:
    return load_for_tuning(config, init_parallel(config.parallel))


def native_weights(model: Path) -> dict[str, Tensor]:
    return dict(load(job(model, "native")).model.backbone.named_parameters())


def error_bound(weights: str, x: Tensor, weight: Tensor) -> Tensor:  # [t, i], [o, i] -> [t, o]
    """Rounding is off by half a step at the most: of int8 a 127.5th of the row's largest weight, of NF4 half its widest
    gap.
    """
    if weights == "int8":
        return x.abs().sum(-1, keepdim=True) * weight.abs().amax(-1) / 127.5 / 2
    largest = weight.abs().unflatten(-1, (-1, 64)).amax(-1).repeat_interleave(64, dim=-1)
    return x.abs() @ (largest * NF4_GAP / 2).t()


@pytest.mark.parametrize("weights", FORMATS)
def test_every_product_is_within_the_rounding_of_its_weights(weights: str, model: Path) -> None:
    """A scale that belongs to another row or block, or nibbles read the other way round."""
    native, found = native_weights(model), dict(quantized_weights(load(job(model, weights)).model.backbone))
    assert len(found) == 3 * 4
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for name, linear in found.items():
        weight, rows = native[name], x[:, : native[name].shape[1]]
        error, bound = (linear.product(rows) - rows @ weight.t()).abs(), error_bound(weights, rows, weight)
        assert (error <= bound * 1.01 + 1e-5).all(), name
        assert error.mean() > bound.mean() / 100, "nothing was rounded"


@pytest.mark.parametrize("weights", FORMATS)
def test_the_gradient_of_inputs_is_that_of_the_dequantized_weights(weights: str, model: Path) -> None:
    """LoRA below a quantized map that learns nothing, or from the weights transposed."""
    for name, linear in quantized_weights(load(job(model, weights)).model.backbone):
        x = torch.randn(5, 1, linear.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
        out, _ = linear(x)
        torch.testing.assert_close(out, x @ linear.dequantized().t(), rtol=1e-4, atol=1e-4, msg=name)
        [gradient] = torch.autograd.grad(out.square().sum(), x)
        torch.testing.assert_close(gradient, 2 * out @ linear.dequantized(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.03), ("nf4", 0.35)])
def test_hidden_states_stay_close(weights: str, most: float, model: Path) -> None:
    """A map that was left out. Rounding a normal weight moves it by 0.8% (int8, rows of 128) and 9% (NF4) of its size,
    and three layers of four maps add their errors, which are independent, as squares: some √12 times that at the most.
    """
    tokens = torch.arange(24)[None]

    def hidden(weights: str) -> Tensor:
        stage = load(job(model, weights)).model
        return stage.run_layers(stage.embed(tokens))[0]

    wanted, got = hidden("native"), hidden(weights)
    off = float((got - wanted).norm() / wanted.norm())
    assert most / 20 < off < most


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_heads_and_all_other_weights_are_the_models_own(weights: str, family: str, tmp_path: Path) -> None:
    """Heads copied from rounded weights start worse for good; a bias or an embedding that was rounded along. Widths
    here fit no block.
    """
    random_model(family, tmp_path, initializer_range=0.06)
    stage, native = (load(job(tmp_path, each, **{"exits.exit_layers": [2, 6]})).model for each in (weights, "native"))
    heads, wanted = dict(stage.exit_heads.named_parameters()), dict(native.exit_heads.named_parameters())
    assert heads.keys() == wanted.keys() and all(torch.equal(heads[name], wanted[name]) for name in wanted)
    kept, parameters = dict(stage.backbone.named_parameters()), dict(native.backbone.named_parameters())
    rounded = {name for name, _ in quantized_weights(stage.backbone)}
    assert parameters.keys() - kept.keys() == rounded and len(rounded) == 6 * 4
    assert all(torch.equal(kept[name], parameters[name]) for name in kept)
    tokens = torch.arange(9)[None]
    close = [each.run_layers(each.embed(tokens))[0] for each in (stage, native)]
    assert (close[0] - close[1]).norm() < 0.4 * close[1].norm(), "a bias added twice, or not at all"


@pytest.mark.parametrize("weights", FORMATS)
def test_memory_is_what_the_formats_say_and_the_dry_run_knows(weights: str, model: Path) -> None:
    """Weights kept beside their rounded copies; a plan that says 4 bits and counts 16."""
    config = job(
        model,
        weights,
        **{
            "model.dtype": "bfloat16",
            "tuning.seq_length": 8,
            "tuning.micro_batch_size": 1,
            "tuning.global_batch_size": 1,
        },
    )
    maps = [(4 * 32 + 2 * 2 * 32, 128), (128, 4 * 32), (2 * 256, 128), (128, 256)]
    bytes_of = {"int8": lambda o, i: o * i + 4 * o, "nf4": lambda o, i: o * i / 2 + 4 * o * i / 64}[weights]
    others = 2 * (101 * 128 + 3 * 2 * 128)  # embedding, norms
    loaded = load(config)
    backbone = loaded.model.backbone
    angles = backbone.angles.nbytes
    held = sum(each.nbytes for each in (*backbone.parameters(), *backbone.buffers()))
    assert held - angles == others + 3 * sum(bytes_of(*each) for each in maps)
    destroy_parallel()
    (profile,) = profile_ranks(config, 1)
    assert profile.memory["weights"] == held
    # A product wants its own weight in the computing dtype, and no other's.
    (native,) = profile_ranks(
        job(
            model,
            "native",
            **{
                "model.dtype": "bfloat16",
                "tuning.seq_length": 8,
                "tuning.micro_batch_size": 1,
                "tuning.global_batch_size": 1,
            },
        ),
        1,
    )
    assert profile.memory["activations"] <= native.memory["activations"] + 2 * max(o * i for o, i in maps) + 4096


def test_what_can_not_be_done_is_said_first(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that stay in 16 bits though 4 were asked for end out of memory; an ImportError names no remedy."""
    random_model("mixtral", tmp_path)
    with pytest.raises(InputError, match="is for models without experts, and this one has 5"):
        load(job(tmp_path, "nf4", **{"exits.architecture": ["norm"]}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    with pytest.raises(InputError, match=r"needs torchao, which is not installed; pip install 'ee_tuning\[quantize\]'"):
        load(job(model, "int8"))


def test_quantization_is_layer_by_layer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model built whole before its weights are rounded needs the memory that rounding was to spare."""
    from ee_tuning.model import backbone

    alive: list[int] = []
    build = backbone.build_layer

    def counted(*args: Any, **keys: Any) -> Any:
        layer = build(*args, **keys)
        built.append(layer)
        alive.append(
            sum(
                not isinstance(part, QuantizedLinear)
                for each in built
                for name, part in each.named_modules()
                if name.rpartition(".")[2] in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
            )
        )
        return layer

    built: list[Any] = []
    monkeypatch.setattr(backbone, "build_layer", counted)
    load(job(model, "int8"))
    assert alive == [4, 4, 4], "of the stock maps no more than one layer's are there"
