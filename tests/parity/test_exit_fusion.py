"""Tokens chosen by an exit and the final head together, against ten lines over transformers' logits."""

from typing import Any

import pytest
import torch
from decoding import FixedDrafts, run_all
from mixtures import LAYERS, Subject
from torch.nn.functional import kl_div

from ee_tuning.engine.engine import Engine
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64]]
FUSIONS = {
    "contrast": ExitFusion(contrast_layers=(2,)),
    "dynamic": ExitFusion(contrast_layers=(4, 2)),
    "all": ExitFusion(contrast_layers=(4,), contrast_alpha=0.0),
    "mixed": ExitFusion(fuse_layer=2, fuse_weight=0.7),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("subject"))


def reference(logits: dict[int, torch.Tensor], fusion: ExitFusion) -> torch.Tensor:  # layer -> [v]
    """The scores of the next token, -inf where it can not come."""
    final = logits[LAYERS].softmax(-1)
    if fusion.fuse_layer is not None:
        other = logits[fusion.fuse_layer].softmax(-1)
        return final.log() * (1 - fusion.fuse_weight) + other.log() * fusion.fuse_weight

    def divergence(layer: int) -> float:
        other = logits[layer].softmax(-1)
        middle = (final + other) / 2
        return sum(kl_div(middle.log(), each, reduction="sum").item() for each in (final, other)) / 2

    base = logits[max(fusion.contrast_layers, key=divergence)].log_softmax(-1)
    return (final.log() - base).masked_fill(final < fusion.contrast_alpha * final.max(), -torch.inf)


def params_of(fusion: ExitFusion, **keys: Any) -> SamplingParams:
    return SamplingParams(fusion=fusion, ignore_eos=True, **{"max_tokens": 12, **keys})


def told(engine: Engine, requests: list[tuple[list[int], SamplingParams, Policy]]) -> list[list[int]]:
    sequences = [engine.add_request(*request)[0] for request in requests]
    run_all(engine)
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("policy", [{"policy": "full"}, {"threshold": 0.5}], ids=["full", "threshold"])
@pytest.mark.parametrize("name", FUSIONS)
def test_tokens_are_those_of_ten_lines(subject, name, policy):
    """An exit of another token or layer; a contrast where the token left early; log-probabilities of the final head's
    own distribution; a batch in which rows take each other's logits.
    """
    fusion, engine = FUSIONS[name], subject.engine()
    params = params_of(fusion, logprobs=2)
    sequences = [engine.add_request(prompt, params, subject.policy(**policy))[0] for prompt in PROMPTS]
    plain = engine.add_request(PROMPTS[0], SamplingParams(max_tokens=12, ignore_eos=True), FULL)[0]
    tokens, left = {s.number: list(s.tokens) for s in sequences}, set()
    for step in run_all(engine):
        if step.sequence is plain:
            continue
        before = tokens[step.sequence.number]
        logits = {layer: rows[-1] for layer, rows in subject.plain.logits(before).items()}
        scores = reference(logits, fusion) if step.exit_layer == LAYERS else logits[step.exit_layer]
        known = scores.log_softmax(-1)
        assert step.token_id == int(known.argmax())
        assert step.logprob == pytest.approx(known.max().item(), abs=1e-4)
        before.append(step.token_id)
        left.add(step.exit_layer)
    assert left == ({LAYERS} if "policy" in policy else {2, 4, LAYERS})
    assert plain.output == subject.wanted(PROMPTS[0], plain.params, FULL)[0]


def test_a_fusion_changes_what_is_said(subject):
    """Options that are read and lost."""
    wanted = [told(subject.engine(), [(PROMPTS[0], params_of(fusion), FULL)])[0] for fusion in FUSIONS.values()]
    plain = told(subject.engine(), [(PROMPTS[0], params_of(ExitFusion()), FULL)])[0]
    assert len({tuple(each) for each in [plain, *wanted]}) == len(FUSIONS) + 1


@pytest.mark.parametrize("drafts", [{2: 0.0}, {4: 0.0}, {2: 0.6, 4: 0.3}], ids=str)
@pytest.mark.parametrize("name", ["contrast", "dynamic", "mixed"])
def test_speculation_checks_by_the_fused_distribution(subject, name, drafts):
    """A draft that is checked against the final head alone; an exit that is asked about the newest draft and not those
    before it; logits of a draft that was rejected.
    """
    for keys in ({}, {"temperature": 0.9, "seed": 3, "logprobs": 2}):
        params = params_of(FUSIONS[name], max_tokens=30, **keys)
        engine = subject.engine()
        engine.proposer.speculation = FixedDrafts(engine, drafts)
        policy = Policy(drafts_at=(2, 4), looks_up=True)
        sequences = [engine.add_request(prompt, params, policy)[0] for prompt in PROMPTS]
        run_all(engine)
        wanted = told(subject.engine(), [(prompt, params, FULL) for prompt in PROMPTS])
        assert [sequence.output for sequence in sequences] == wanted
        seen = [sequence.statistics for sequence in sequences]
        assert sum(each.num_drafted for each in seen) > sum(each.num_accepted for each in seen)
        if (name, drafts) == ("mixed", {2: 0.0}):  # the exit that drafts is most of what checks
            assert sum(each.num_accepted for each in seen) > 10


def test_minimum_lengths_and_forms_of_sampling_hold(subject):
    """A stop token that alone is likely enough, before `min_tokens`."""
    stops = tuple(range(60, 101))
    for fusion in FUSIONS.values():
        params = params_of(fusion, min_tokens=8, stop_token_ids=stops)
        (said,) = told(subject.engine(), [(PROMPTS[0], params, FULL)])
        assert not set(said[:8]) & set(stops)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"contrast_layers": (3,)}, ["contrast_layers", "2, 4", "got 3"]),
        ({"contrast_layers": (6,)}, ["2, 4", "got 6"]),
        ({"fuse_layer": 0}, ["fuse_layer", "2, 4", "got 0"]),
        ({"contrast_layers": (2,), "fuse_layer": 4}, ["exclude each other"]),
        ({"contrast_layers": (2, 2)}, ["each exit once"]),
        ({"contrast_layers": (2,), "contrast_alpha": 1.5}, ["contrast_alpha", "0..1", "1.5"]),
        ({"fuse_layer": 2, "fuse_weight": -1.0}, ["fuse_weight", "0..1"]),
    ],
)
def test_what_can_not_be_fused_is_refused(subject, keys, named):
    """An exit that is not there, taken for another."""
    with pytest.raises(InputError) as error:
        subject.engine().add_request([5], params_of(ExitFusion(**keys)), FULL)
    assert all(word in str(error.value) for word in named), error.value


def test_policies_and_heads_that_can_not_be_fused_are_refused(subject):
    """Tokens of an exit alone under the name of a contrast; a shortlist that finds most tokens impossible."""
    fixed = subject.policy(policy="fixed", exit_layer=2)
    with pytest.raises(InputError, match="the policy fixed never asks"):
        subject.engine().add_request([5], params_of(FUSIONS["contrast"]), fixed)
    for spec, words in (
        (ExitSpec(layer=2, architecture="norm", ties_output=False, output_vocab=50), "shortlist of 50"),
        (ExitSpec(layer=2, architecture="layer", ties_output=False), "architecture layer"),
    ):
        with pytest.raises(InputError, match=words):
            FUSIONS["contrast"].check((spec,), FULL)
