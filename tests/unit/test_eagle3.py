"""The drafting head of EAGLE-3, against a drafter written down plainly, token by token, and a published one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_drafter import PlainDrafter, tensors_of
from random_models import random_model
from torch import Tensor

from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.draft_spec import FEWEST_LAYERS, DraftSpec, draft_spec
from ee_tuning.model.eagle3 import Eagle3Head
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model_config.config import RopeConfig, read_model_config
from ee_tuning.parallel.topology import init_parallel

EXAMPLES = Path(__file__).parents[2] / "examples"
# s sequence · b rows · h hidden · k steps · v vocabulary
AUX = (1, 3, 5)


def make_head(model_config: Any, draft: DraftSpec, seed: int = 0) -> tuple[Eagle3Head, dict[str, Tensor]]:
    """A random head, and its tensors by the layout's names."""
    from ee_tuning.model.exit_spec import ExitSpec

    spec = ExitSpec(layer=model_config.num_layers, architecture="eagle3", ties_output=False, draft=draft)
    head = Eagle3Head(
        spec,
        model_config,
        init_parallel(ParallelSection()),
        dtype=torch.float64,
        tied_weight=None,
        angles=torch.zeros(0),
    )
    assert isinstance(head, Eagle3Head)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return head, tensors_of(head, model_config)


VARIANTS = {
    "llama": {},
    "qwen3": {"family": "qwen3"},
    "eagle3.1": {"fc_norm": True, "norm_output": True},
    "normed": {"norm_before_fc": True, "norm_before_residual": True},
}


def shape(tmp_path: Path) -> Any:
    from ee_tuning.model_config.config import read_model_config

    random_model("llama", tmp_path / "model")
    return read_model_config(tmp_path / "model")


def spec(**changes: Any) -> DraftSpec:
    return DraftSpec(
        **{
            "aux_layers": AUX,
            "ffn_hidden_size": 30,
            "num_attention_heads": 6,
            "num_query_groups": 2,
            "kv_channels": 8,
            "norm_epsilon": 1e-5,
            "rope": RopeConfig(theta=500.0),
            **changes,
        }
    )


def head_input(
    s: int, b: int, h: int, steps: int, documents: PackedDocuments | None = None
) -> tuple[ExitInput, Tensor]:
    """Random states, and embeddings [s + steps, b, h] of the tokens of `b` rows, the first one's left out."""
    torch.manual_seed(7)
    states, ahead = torch.randn(s, b, 3 * h, dtype=torch.float64), torch.randn(s + steps, b, h, dtype=torch.float64)
    return ExitInput(states, documents=documents, next_embeddings=tuple(ahead[k : k + s] for k in range(steps))), ahead


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrolled_steps_are_drafts_that_begin_at_every_token(tmp_path: Path, variant: str) -> None:
    """A step that sees later tokens or another token's draft, that stands at a wrong place, that forgets a norm."""
    config, draft = shape(tmp_path), spec(**VARIANTS[variant])
    (head, tensors), (s, b, h, k) = make_head(config, draft), (7, 2, 48, 3)
    inputs, ahead = head_input(s, b, h, k)
    got = head(inputs, F.linear).unflatten(1, (k, b))  # [s, k, b, v]
    plain = PlainDrafter(tensors, draft)
    for row in range(b):
        for token in (0, 3, 6):
            states = [list(inputs.hidden[place, row].chunk(3)) for place in range(token + 1)]
            embeddings = [ahead.new_zeros(h), *ahead[:, row]]  # of token 0, which no step reads, and of all others
            wanted = torch.stack(plain.drafts(states, embeddings, k))
            torch.testing.assert_close(got[token, :, row], wanted, rtol=0, atol=1e-5)  # angles are float32


def test_drafts_of_a_document_do_not_see_the_one_before(tmp_path: Path) -> None:
    """Attention over packed rows that reaches across, or positions that go on counting, in the steps behind the first
    above all.
    """
    config, draft = shape(tmp_path), spec()
    head, _ = make_head(config, draft)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed, _ = head_input(9, 1, 48, 3, PackedDocuments.of(ids, positions, torch.device("cpu")))
    alone = ExitInput(packed.hidden[4:], next_embeddings=tuple(each[4:] for each in packed.next_embeddings))
    torch.testing.assert_close(head(packed, F.linear)[4:], head(alone, F.linear), rtol=0, atol=1e-12)


def test_blocks_of_queries_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that sees one key too few or too many, or whose recomputation in the backward pass is another one."""
    config, draft = shape(tmp_path), spec()
    head, _ = make_head(config, draft)
    inputs, _ = head_input(11, 2, 48, 3)
    gradients = []
    for block in (256, 4):
        monkeypatch.setattr("ee_tuning.model.unrolled_attention.BLOCK", block)
        head.zero_grad()
        head(inputs, F.linear).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in head.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_speculators_own_module(tmp_path: Path, variant: str) -> None:
    """A plain drafter of our own that shares our misreading of the layout."""
    eagle3 = pytest.importorskip("speculators.models.eagle3")
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.proposals import GreedyTokenProposalConfig
    from transformers import AutoConfig

    config, draft = shape(tmp_path), spec(**VARIANTS[variant])
    (head, tensors), (s, h, k) = make_head(config, draft), (7, 48, 3)
    layer = AutoConfig.for_model(
        draft.family,
        hidden_size=h,
        vocab_size=config.vocab_size,
        num_hidden_layers=1,
        intermediate_size=draft.ffn_hidden_size,
        num_attention_heads=draft.num_attention_heads,
        num_key_value_heads=draft.num_query_groups,
        head_dim=draft.kv_channels,
        rms_norm_eps=draft.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": draft.rope.theta},
    )
    layer._attn_implementation = "eager"
    variants = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    published = eagle3.Eagle3DraftModel(
        eagle3.Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=config.vocab_size,
            eagle_aux_hidden_state_layer_ids=list(AUX),
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=k)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=[]),
            ),
            **{name: getattr(draft, name) for name in variants},
        )
    ).double()
    words = torch.randn(config.vocab_size, h, dtype=torch.float64)
    renamed = {
        key.replace("midlayer.", "layers.0.").replace("output.", "lm_head."): value for key, value in tensors.items()
    }
    left = published.load_state_dict({**renamed, "embed_tokens.weight": words}, strict=False)
    assert not left.unexpected_keys and all("verifier" in key or "rotary" in key for key in left.missing_keys)
    tokens = torch.randint(0, config.vocab_size, (1, s + k))
    states = torch.randn(s, 1, 3 * h, dtype=torch.float64)
    ahead = words[tokens[0]][:, None]
    got = head(ExitInput(states, next_embeddings=tuple(ahead[i : i + s] for i in range(k))), F.linear)
    said: list[Tensor] = []
    published.lm_head.register_forward_hook(lambda module, inputs, out: said.append(out))
    with torch.no_grad():
        published(states.transpose(0, 1), tokens[:, :s], torch.zeros(1, s, dtype=torch.long), ttt_steps=k)
    for step in range(k):  # it pads the row with token 0, so the last tokens' later drafts are of another text
        torch.testing.assert_close(got[: s - step, step], said[step][0, : s - step], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_layers", range(1, 9))
def test_too_few_layers_are_refused_with_layers_that_are_taken(num_layers):
    """A model of 6 layers whose default layers, 2, 3 and 3, pass as three, and an example that is itself refused."""
    model = dataclasses.replace(read_model_config(EXAMPLES / "llama-3.1-8b"), num_layers=num_layers)
    if num_layers >= FEWEST_LAYERS:
        assert draft_spec(model, ()).aux_layers == (2, num_layers // 2, num_layers - 3)
    else:
        with pytest.raises(InputError, match=rf"the model's {num_layers} layers are too few") as refusal:
            draft_spec(model, ())
        told = tuple(map(int, str(refusal.value).rpartition("--aux-layers ")[2].split(",")))
        assert draft_spec(model, told).aux_layers == told
    with pytest.raises(InputError, match=r"must lie in 0\.\.") as refusal:
        draft_spec(model, (num_layers + 1,))
    told = tuple(map(int, str(refusal.value).rpartition("--aux-layers ")[2].split(",")))
    assert draft_spec(model, told).aux_layers == told
