"""Where the model is trained, every gradient is what autograd finds in transformers' model with the same losses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exits import write_exits
from plain_decoder import PlainDecoder
from random_models import WITH_EXPERTS, random_model
from torch import Tensor

from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.checkpoint.names import merge_shards
from ee_tuning.checkpoint.trained_names import trained_shapes
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.data.loader import Batch
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.backbone_trainer import BackboneTrainer
from ee_tuning.tuning.exit_trainer import ExitTrainer
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.optimizer import ExitOptimizer
from ee_tuning.tuning.stage_forward import StageForward

TOKENS = [5, 17, 80, 3, 9, 77, 0, 41, 12, 60]
LABELS = torch.tensor(TOKENS[1:] + TOKENS[:1])
WEIGHTS = {2: 0.5, 4: 2.0}
FINAL_WEIGHT = 0.75


def configure(folder: Path, shares_head: bool = False, **tuning: object) -> Config:
    heads = {"exits.exit_layers": list(WEIGHTS), "exits.output": "shared"}
    keys: dict[str, object] = {
        "model.path": str(folder / "model"),
        **(heads if shares_head else {"exits.path": str(folder / "exits")}),
        "model.dtype": "float32",
        "tuning.seq_length": len(TOKENS),
        "tuning.loss_weights": list(WEIGHTS.values()),
        "tuning.final_loss_weight": FINAL_WEIGHT,
        "tuning.loss_chunk_tokens": 4,
    }
    return load_config(None, keys | {f"tuning.{key}": value for key, value in tuning.items()})


def gradients(config: Config) -> tuple[dict[str, Tensor], BackboneTrainer]:
    """Of every tensor of the model that is trained, under its stored name, from one micro-batch. LoRA's second matrices
    are not zero.
    """
    topology = init_parallel(ParallelSection())
    model = load_for_tuning(config, topology).model
    backbone = BackboneTrainer(model, config.tuning, topology, 1.0)
    for name, each in backbone.optimizer._trained.items():
        if name.endswith("lora_B"):
            draw = torch.Generator().manual_seed(len(name))
            each.parameter.data.copy_(0.1 * torch.randn(each.parameter.shape, generator=draw))
    own = () if model.plan.shares_final_head else (2, 4)
    exits = [ExitOptimizer(model.exit_head(layer), WEIGHTS[layer], config.tuning, topology) for layer in own]
    trainer = ExitTrainer(exits, model, config.tuning, topology, None, backbone)
    batch = Batch(tokens=torch.tensor([TOKENS]), labels=LABELS[:, None], loss_mask=torch.ones(len(TOKENS), 1))
    chunk = batch.chunks()[0]
    microbatch = Microbatch(chunk=chunk, is_training=True, step=1, is_last=True, position=1, ends_step=True)
    trainer.train(StageForward(model, Any, topology).forward(microbatch, NextAction.END))
    found = {}
    for name, gradient in backbone.optimizer._gradients.items():
        found |= merge_shards([backbone.optimizer._trained[name].plan(0)], [gradient])
    return found, backbone


def reference_loss(model: Any, exits: Path) -> Tensor:
    said = PlainDecoder(model, exits, tuple(WEIGHTS), torch.float32).logits(TOKENS, differentiates=True)
    weights = {**WEIGHTS, 6: FINAL_WEIGHT}
    return sum(weights[layer] * F.cross_entropy(said[layer], LABELS, reduction="sum") for layer in said)  # type: ignore[return-value]


def expert_gradient(name: str, packed: dict[str, Tensor]) -> Tensor:
    """The gradient of a stored tensor, from transformers' parameters, which hold all experts of a layer in one."""
    name = name.replace("block_sparse_moe", "mlp")
    stem, _, rest = name.partition(".experts.")
    if not rest:
        return packed[name]
    expert, kind, _ = rest.split(".")
    if kind in ("w2", "down_proj"):
        return packed[f"{stem}.experts.down_proj"][int(expert)]
    gate, up = packed[f"{stem}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if kind in ("w1", "gate_proj") else up


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    ("family", "trainable"),
    [
        ("llama", "backbone"),
        ("qwen2", "last:3"),
        ("qwen3", "backbone"),
        ("gpt2", "backbone"),
        ("llama", "mlp"),
        ("mixtral", "backbone"),
        ("qwen3_moe", "mlp"),
    ],
)
def test_gradients_equal_autograd_through_transformers(
    tmp_path: Path, family: str, trainable: str, recomputes: bool
) -> None:
    """An exit's gradient that does not reach the layers before it, or reaches them twice or unweighted; a matrix whose
    gradient is in Megatron's order; a router without one.
    """
    reference, has_experts = random_model(family, tmp_path / "model"), family in WITH_EXPERTS
    write_exits(tmp_path / "model", tmp_path / "exits", architecture=["norm" if has_experts else "mlp", "layer"])
    config = configure(tmp_path, trainable=trainable, recompute_activations=recomputes)
    found, backbone = gradients(config)
    never = trained_shapes(config.tuning, backbone._model.config).keys() - found.keys()
    assert found and all(".experts." in name for name in never)  # that no token chose
    reference_loss(reference, tmp_path / "exits").backward()
    packed = {name: each.grad for name, each in reference.named_parameters() if each.grad is not None}
    assert not any(expert_gradient(name, packed).any() for name in never)
    for name, gradient in found.items():
        wanted = expert_gradient(name, packed)
        limit = 1e-5 * wanted.abs().max().item()
        message = partial("{}: {}".format, name)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=limit, msg=message)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_depths_that_share_the_final_head_equal_autograd_through_transformers(tmp_path: Path, family: str) -> None:
    """A gradient of norm, output matrix or embedding that only one depth gives, or that is not weighted; of a tied
    matrix, only one of its two gradients.
    """
    keys = {"tie_word_embeddings": True} if family == "qwen3" else {}
    reference = random_model(family, tmp_path / "model", **keys)
    found, _ = gradients(configure(tmp_path, shares_head=True, trainable="all"))
    base = reference.transformer if family == "gpt2" else reference.model
    norm = base.ln_f if family == "gpt2" else base.norm
    out = reference(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False)
    said = {layer: reference.lm_head(norm(out.hidden_states[layer][0])) for layer in WEIGHTS} | {6: out.logits[0]}
    weights = {**WEIGHTS, 6: FINAL_WEIGHT}
    losses = [weights[layer] * F.cross_entropy(said[layer], LABELS, reduction="sum") for layer in said]
    torch.stack(losses).sum().backward()
    wanted = {name: each.grad for name, each in reference.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        limit = 1e-5 * wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=limit, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
def test_lora_equals_low_rank_maps_beside_the_maps_of_transformers(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Products in the place of another head or matrix, of Megatron's fused maps; a scale that counts twice."""
    reference = random_model("llama", tmp_path / "model").requires_grad_(False)
    write_exits(tmp_path / "model", tmp_path / "exits", architecture=["mlp", "norm"])
    found, backbone = gradients(configure(tmp_path, trainable="lora", lora_rank=3, lora_alpha=6, lora_targets=targets))
    pairs = {}
    for _, each in backbone.optimizer._trained.items():
        pairs |= merge_shards([each.plan(0)], [each.parameter.detach()])
    assert pairs.keys() == found.keys() and len(pairs) == 6 * 2 * (len(targets) or 7)
    leaves = {name: pair.clone().requires_grad_() for name, pair in pairs.items()}
    for name, a in leaves.items():
        if ".lora_A." in name:
            module = reference.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            b = leaves[name.replace("lora_A", "lora_B")]
            module.register_forward_hook(lambda _, x, y, a=a, b=b: y + 2 * (x[0] @ a.t() @ b.t()))
    reference_loss(reference, tmp_path / "exits").backward()
    for name, gradient in found.items():
        wanted = leaves[name].grad
        assert wanted is not None
        limit = 1e-5 * wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=limit, msg=partial("{}: {}".format, name))
