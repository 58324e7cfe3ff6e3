"""Decoding with exits that say a part of the vocabulary: what transformers and a plain loop say, by every policy."""

import math
from pathlib import Path

import pytest
import torch
from decoding import decode, run_all
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder, confidence
from random_models import random_llama
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.engine.engine import Engine
from ee_tuning.generation.scoring import score
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.shortlist import UNSURE
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy

LISTED = tuple(range(0, 101, 3))
PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64], [99, 1, 0]]
NEW_TOKENS = 24
HEADS = {
    "norm": {"architecture": "norm"},
    "layer, linear": {"architecture": "layer,linear"},
    "mlp copied": {"init": "copy"},
}


class ListedDecoder(PlainDecoder):
    """Decodes with exits that say no more than LISTED."""

    def said(
        self, logits: Tensor, layer: int, measure: str
    ) -> tuple[int, float]:  # [v] or [classes] -> likeliest token, confidence
        if layer == len(self.layers):
            return int(logits.argmax()), confidence(logits, measure)
        return LISTED[int(logits[:-1].argmax())], confidence(logits, measure) if logits.argmax() < len(LISTED) else -1.0

    def decode_listed(
        self, prompt: list[int], threshold: float, measure: str = "max_probability", fixed: int | None = None
    ) -> tuple[list[int], list[int]]:
        tokens, left, last = list(prompt), [], len(self.layers)
        for step in range(NEW_TOKENS):
            logits = self.logits(tokens)
            for layer in (*self.exit_layers, last):
                token, sure = self.said(logits[layer][-1], layer, measure)
                if layer == (fixed or last) or (fixed is None and step > 0 and sure >= threshold):
                    break
            tokens.append(token)
            left.append(layer)
        return tokens[len(prompt) :], left


def subject(folder: Path, heads: dict[str, str], *, ties: bool = False) -> tuple[LoadedModel, ListedDecoder]:
    reference = random_llama(folder / "model", confident=True, tie_word_embeddings=ties)
    exits = write_exits(folder / "model", folder / "exits", LISTED, **heads)
    loaded = loaded_with(folder / "model", exits, dtype="float64")
    return loaded, ListedDecoder(reference, exits, (2, 4), torch.float64)


@pytest.fixture(scope="module", params=HEADS)
def each_kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, ListedDecoder]:
    return subject(tmp_path_factory.mktemp("subject"), HEADS[request.param], ties=request.param == "mlp copied")


@pytest.fixture(scope="module")
def norm(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, ListedDecoder]:
    return subject(tmp_path_factory.mktemp("norm"), HEADS["norm"])


@pytest.mark.parametrize(
    ("threshold", "measure"), [(0.6, "max_probability"), (0.0, "max_probability"), (0.3, "margin"), (0.2, "entropy")]
)
def test_tokens_and_exit_layers_equal_the_plain_decoder(
    each_kind: tuple[LoadedModel, ListedDecoder], threshold: float, measure: str
) -> None:
    """A class said in place of its token; a token that leaves, at threshold 0, where "any other token" is likeliest."""
    loaded, plain = each_kind
    wanted = [plain.decode_listed(prompt, threshold, measure) for prompt in PROMPTS]
    assert len({layer for _, layers in wanted for layer in layers}) > 1
    for batch in ([PROMPTS], [[prompt] for prompt in PROMPTS]):
        said = [
            each
            for prompts in batch
            for each in decode(loaded, prompts, NEW_TOKENS, threshold=threshold, measure=measure)
        ]
        assert [(each.tokens, each.exit_layers) for each in said] == wanted
        assert all(0 <= value <= 1 for each in said for value in each.confidences)


def test_a_fixed_exit_says_the_likeliest_token_that_is_listed(each_kind: tuple[LoadedModel, ListedDecoder]) -> None:
    """ "Any other token" is no token to go on with."""
    loaded, plain = each_kind
    wanted = [plain.decode_listed(prompt, 2.0, fixed=4) for prompt in PROMPTS]
    assert [
        (each.tokens, each.exit_layers) for each in decode(loaded, PROMPTS, NEW_TOKENS, policy="fixed", exit_layer=4)
    ] == wanted
    assert {token for tokens, _ in wanted for token in tokens} <= set(LISTED)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=NEW_TOKENS),
        SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, seed=3, logprobs=2, min_tokens=3),
    ],
    ids=["greedy", "drawn"],
)
def test_speculation_says_what_full_depth_says(norm: tuple[LoadedModel, ListedDecoder], params: SamplingParams) -> None:
    """A draft of a class, or one that is drawn from probabilities of other tokens than the full model's."""
    loaded, _ = norm
    full, drafted = (
        [each.tokens for each in decode(loaded, prompts, NEW_TOKENS, params=params, policy=policy)]
        for prompts, policy in ((PROMPTS, "full"), (PROMPTS, "speculative"))
    )
    assert drafted == full
    alone = [decode(loaded, [prompt], NEW_TOKENS, params=params, policy="speculative")[0].tokens for prompt in PROMPTS]
    assert alone == full


def test_draws_at_an_exit_are_over_what_it_can_say(norm: tuple[LoadedModel, ListedDecoder]) -> None:
    """Log-probabilities that leave room for tokens that are never drawn; penalties and biases that name ids and meet
    classes.
    """
    loaded, _ = norm
    params = SamplingParams(
        max_tokens=16, temperature=1.5, seed=5, logprobs=40, logit_bias={4: 90.0, 33: 50.0}, repetition_penalty=1.1
    )
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=64)
    engine.add_request(PROMPTS[0], params, Policy(fixed_exit=2))
    steps = run_all(engine)
    assert [step.token_id for step in steps[:3]] == [33] * 3 and {step.token_id for step in steps} <= set(LISTED)
    for step in steps:
        finite = {token: value for token, value in step.top_logprobs.items() if value > -torch.inf}
        assert finite.keys() == set(LISTED)
        assert torch.tensor(list(finite.values())).exp().sum().item() == pytest.approx(1)


def test_a_request_that_allows_nothing_of_the_list_goes_on(norm: tuple[LoadedModel, ListedDecoder]) -> None:
    """NaN drawn from: every listed token is put off as a stop token."""
    loaded, _ = norm
    params = SamplingParams(max_tokens=8, min_tokens=8, stop_token_ids=LISTED, logprobs=0)
    said = decode(loaded, PROMPTS[:1], 8, params=params, threshold=0.0)[0]
    assert set(said.exit_layers) == {6} and not set(said.tokens) & set(LISTED)


@pytest.mark.parametrize("layer", [2, 4])
def test_kernel_and_torch_ask_alike(norm: tuple[LoadedModel, ListedDecoder], layer: int) -> None:
    """The compiled head has the list as a pointer, and its own rule of what is unsure."""
    model = norm[0].model
    head = DecodeExitHead(model, model.exit_head(layer), model.topology)
    if head.native is None:
        pytest.skip("no kernel here")
    confidences = []
    for states in torch.randn(10, 32, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        with torch.inference_mode():
            (logits, top), (wanted, expected) = head.ask(ExitInput(states)), head._answer(ExitInput(states))
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(top, expected, rtol=1e-9, atol=0)
        confidences += top[:, 1].tolist()
    assert 0 < confidences.count(UNSURE) < 160


def test_scores_are_a_distribution_over_the_whole_vocabulary(norm: tuple[LoadedModel, ListedDecoder]) -> None:
    """A continuation that an exit can not say at log-probability -inf, which no mean survives; a class looked up in
    place of a token.
    """
    loaded, plain = norm
    pairs = [(PROMPTS[0], [token]) for token in range(101)]
    found = score(loaded.model, pairs, Policy(fixed_exit=4), 8)
    logprobs = plain.logits(PROMPTS[0])[4][-1].log_softmax(-1)
    for token, each in enumerate(found):
        place = LISTED.index(token) if token in LISTED else len(LISTED)
        wanted = logprobs[place].item() - (0 if token in LISTED else math.log(101 - len(LISTED)))
        assert each.logprobs == [pytest.approx(wanted)] and each.is_greedy == [
            token == LISTED[int(logprobs[:-1].argmax())]
        ]
    assert sum(math.exp(each.logprob) for each in found) == pytest.approx(1)
