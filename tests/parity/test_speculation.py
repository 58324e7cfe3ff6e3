"""Speculative decoding says what the full model says: the same tokens greedily and drawn, and so the same
distribution.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from decoding import FixedDrafts, policy_for, run_all
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import random_llama

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.engine.cost_model import CACHE_BYTES, COUNTS, Costs, expected_costs, expected_growth
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.speculation import CREDIT_PER_PASS, FIRST_CREDIT, Speculation
from ee_tuning.engine.step_plan import Answer
from ee_tuning.sampling.params import SamplingParams

PROMPTS = [[5, 17, 80, 3, 9], [41], [7, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64], [99, 1, 0]]
NEW_TOKENS = 40


def load(folder: Path, dtype: str = "float64", **shape: int) -> tuple[LoadedModel, PlainDecoder]:
    reference = random_llama(folder / "model", confident=True, **shape)
    exits = write_exits(folder / "model", folder / "exits", init="copy")  # alike enough that some drafts are right
    return loaded_with(folder / "model", exits, dtype=dtype), PlainDecoder(reference, exits, (2, 4), torch.float64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, PlainDecoder]:
    return load(tmp_path_factory.mktemp("llama"))


def drafting_engine(loaded: LoadedModel, thresholds: dict[int, float], **options: int) -> Engine:
    """An engine whose exits draft by `thresholds` in every round."""
    engine = Engine(loaded.model, loaded.stages, **{"num_slots": 4, "max_length": 64, **options})
    engine.proposer.speculation = FixedDrafts(engine, thresholds)
    return engine


@pytest.mark.parametrize("plan", [{2: 0.0}, {4: 0.0}, {2: 0.6, 4: 0.3}])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=NEW_TOKENS),
        SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, seed=3),
        SamplingParams(max_tokens=NEW_TOKENS, repetition_penalty=1.2, logprobs=2),
    ],
)
def test_tokens_are_those_of_full_depth(llama, plan, params):
    """A rejected draft whose keys stay, a correction at the wrong place, a draw that depends on what was drafted."""
    loaded, _ = llama
    plain = Engine(loaded.model, loaded.stages, num_slots=4, max_length=64)
    wanted = [plain.add_request(prompt, params)[0] for prompt in PROMPTS]
    expected = {s.number: step for s, step in zip(wanted, [[] for _ in wanted], strict=True)}
    for step in run_all(plain):
        expected[step.sequence.number].append((step.token_id, step.logprob))
    engine = drafting_engine(loaded, plan)
    made = [engine.add_request(prompt, params, policy_for(loaded.model, policy="speculative"))[0] for prompt in PROMPTS]
    said = {s.number: [] for s in made}
    for step in run_all(engine):
        said[step.sequence.number].append((step.token_id, step.logprob))
    for mine, theirs in zip(made, wanted, strict=True):
        assert mine.output == theirs.output
        assert [p for _, p in said[mine.number]] == pytest.approx([p for _, p in expected[theirs.number]], abs=1e-9)
    drafted, kept = (sum(getattr(s.statistics, name) for s in made) for name in ("num_drafted", "num_accepted"))
    assert 0 < kept < drafted, "the claim is empty where all drafts are right, or none"
    for told in (s.statistics for s in made):
        assert sum(told.num_accepted_at) == told.num_accepted and told.num_checks <= told.num_drafted
        assert sorted(told.num_accepted_at, reverse=True) == told.num_accepted_at  # one is kept only behind another


@pytest.mark.parametrize("architecture", ["mlp", "layer"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_repeated_text_drafts(tmp_path, architecture, temperature):
    """Drafts that are checked against the wrong tokens, or keys of rejected ones that stay; a head with a layer of its
    own that misses the tokens of a check. Exits draft nothing here, so all that is accepted was looked up.
    """
    random_llama(tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=architecture, init="copy")
    loaded = loaded_with(tmp_path / "model", exits, dtype="float64")
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=5, logit_bias={7: 100, 8: 100, 9: 99})
    prompts = [prompt * 3 for prompt in PROMPTS]
    plain = Engine(loaded.model, loaded.stages, num_slots=4, max_length=128)
    wanted = [plain.add_request(prompt, params)[0] for prompt in prompts]
    run_all(plain)
    engine = drafting_engine(loaded, {4: 2.0}, max_length=128)
    policy = policy_for(loaded.model, policy="speculative")
    made = [engine.add_request(prompt, params, policy)[0] for prompt in prompts]
    run_all(engine)
    assert [each.output for each in made] == [each.output for each in wanted]
    kept, drafted = (sum(getattr(s.statistics, name) for s in made) for name in ("num_accepted", "num_drafted"))
    assert 20 < kept < drafted
    without = policy_for(loaded.model, policy="speculative", prompt_lookup=False)
    assert not without.looks_up and policy.looks_up


def test_caches_behind_a_check_equal_a_full_pass(llama):
    """Keys of rejected drafts that are taken for those of the tokens in their place."""
    loaded, _ = llama
    engine, fresh = (
        drafting_engine(loaded, {2: 0.0}, num_slots=1),
        Engine(loaded.model, loaded.stages, num_slots=1, max_length=64),
    )
    (sequence,) = engine.add_request(
        PROMPTS[0], SamplingParams(max_tokens=50), policy_for(loaded.model, policy="speculative", prompt_lookup=False)
    )
    while sequence.num_output < 40 or sequence.num_drafts:
        engine.step()
    assert 0 < sequence.statistics.num_accepted < sequence.statistics.num_drafted
    n = sequence.num_computed[-1]
    assert list(sequence.num_computed) == [n] * 3 and n == len(sequence.tokens) - 1
    fresh.full_model_tokens(sequence.tokens[:-1])
    for layer in range(1, 7):
        for name in ("keys", "values"):
            mine, theirs = (getattr(e.cache.layer(layer), name)[:n] for e in (engine, fresh))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_the_distribution_is_the_full_models(tmp_path):
    """A token that a rejection makes more or less likely. Chi-square of three tokens, 20,000 draws, 0.001 by Wilson and
    Hilferty.
    """
    loaded, plain = load(tmp_path, vocab_size=5, eos_token_id=None, bos_token_id=None)
    params, draws = SamplingParams(max_tokens=3, temperature=3.0, n=1000), 20
    engine = drafting_engine(loaded, {2: 0.0}, num_slots=128)
    made = [
        s
        for seed in range(draws)
        for s in engine.add_request(
            [1, 2], SamplingParams(**{**vars(params), "seed": seed}), policy_for(loaded.model, policy="speculative")
        )
    ]
    run_all(engine)
    drafted, kept = (sum(getattr(s.statistics, name) for s in made) for name in ("num_drafted", "num_accepted"))
    assert 0.2 < kept / drafted < 0.98
    counts = torch.bincount(
        torch.tensor([s.output[0] * 25 + s.output[1] * 5 + s.output[2] for s in made]), minlength=125
    )
    known = {
        prefix: (plain.logits([1, 2, *prefix])[6][-1] / 3.0).softmax(-1)
        for length in range(3)
        for prefix in product(range(5), repeat=length)
    }
    expected = torch.stack(
        [known[()][a] * known[(a,)][b] * known[(a, b)][c] for a, b, c in product(range(5), repeat=3)]
    ) * len(made)
    often = expected >= 5
    merged = (
        torch.cat((counts[often], counts[~often].sum()[None])),
        torch.cat((expected[often], expected[~often].sum()[None])),
    )
    freedom = int(often.sum())
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert len(made) == 20_000 and freedom > 20
    assert float(((merged[0] - merged[1]) ** 2 / merged[1].clamp(min=1e-9)).sum()) < limit


def dear_exits(engine: Engine) -> Speculation:
    """Exits in front of a cheap rest, asked at the cost of a hundred passes."""
    dear, cheap = (1.0,) * 3, (0.01,) * 3
    return Speculation(Costs((dear, cheap, cheap), {2: dear, 4: dear}, cheap), engine.segments)


def test_speculation_stops_where_it_would_lose(llama):
    """Drafts that are never right, or as dear as the full model, asked for again and again."""
    loaded, _ = llama
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=128)
    known = engine.proposer.speculation = dear_exits(engine)
    (sequence,) = engine.add_request(
        [5],
        SamplingParams(max_tokens=100, ignore_eos=True),
        policy_for(loaded.model, policy="speculative", prompt_lookup=False),
    )
    asked = 0
    while not sequence.finish_reason:
        engine.step()
        asked += bool(sequence.drafts.thresholds)
    assert known.best_plan(1, (2, 4)).exit_layer is None and asked <= 2 and sequence.statistics.num_drafted == 0


def test_speculation_loses_little_where_it_was_wrong(llama):
    """An exit that seems cheap and right, and never is: tried for ever."""
    loaded, _ = llama
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=128)
    cheap = (0.1, 0.1, 0.1)
    known = engine.proposer.speculation = Speculation(
        Costs((cheap, (1.0,) * 3, (1.0,) * 3), {2: cheap, 4: cheap}, cheap), engine.segments
    )
    (sequence,) = engine.add_request(
        [5], SamplingParams(), policy_for(loaded.model, policy="speculative", prompt_lookup=False)
    )
    lost, tried = 0.0, 0
    for _ in range(400):
        known.begin_round(sequence, 1, 16)
        before = known.credit
        if known.best_plan(1, (2, 4)).exit_layer in sequence.drafts.thresholds and sequence.drafts.most:
            tried += 1
            sequence.drafts.answers.append((0, 2, 0.99, 7))
            sequence.drafts.layers.append(2)
            known.end_round(sequence, [Answer(0.9, 8), Answer(0.9, 8)], 0)
            lost += before - known.credit
    assert tried and lost < FIRST_CREDIT + 400 * CREDIT_PER_PASS + 2


def test_sequences_side_by_side_ask_unused_exits_in_the_same_step(llama):
    """A head whose weights are read in one step for one sequence, and in the next for another; a survey that every
    sequence pays as if it were alone.
    """
    loaded, _ = llama
    engine = Engine(loaded.model, loaded.stages, num_slots=4, max_length=128)
    layers, head, cheap = (1.0,) * 3, (0.4,) * 3, (0.01,) * 3
    known = engine.proposer.speculation = Speculation(
        Costs((layers, cheap, cheap), {2: head, 4: head}, cheap), engine.segments
    )
    for layer in (2, 4):
        known.records[layer].add(0.1, False)
    made = [
        engine.add_request(
            [5, place],
            SamplingParams(max_tokens=100, ignore_eos=True),
            policy_for(loaded.model, policy="speculative", prompt_lookup=False),
        )[0]
        for place in range(4)
    ]
    asking, begin = list[int](), known.begin_round

    def counted(sequence, num_rows, most):
        assert known.credit > 0
        begin(sequence, num_rows, most)
        asking.append(len(sequence.drafts.thresholds) == 2)

    known.begin_round = counted
    while not any(each.finish_reason for each in made):
        engine.step()
    steps = [sum(asking[at : at + 4]) for at in range(0, len(asking), 4)]
    assert {*steps} == {0, 4} and 2 <= steps.count(4) <= 4


def test_speculation_goes_on_where_it_wins(llama):
    """A plan that gives up exits that are cheap and right."""
    loaded, _ = llama
    engine = Engine(loaded.model, loaded.stages, num_slots=1, max_length=64)
    speculation = Speculation(
        Costs(((0.1, 0.11, 0.12),) * 2 + ((1.0, 1.1, 1.2),), {2: (0.01,) * 3, 4: (0.5,) * 3}, (0.01,) * 3),
        engine.segments,
    )
    for _ in range(50):
        speculation.records[2].add(0.92, True)
        speculation.records[2].add(0.35, False)
        speculation.records[4].add(0.65, False)
    plan = speculation.best_plan(1, (2, 4))
    assert plan.exit_layer == 2 and 0.3 < plan.threshold <= 0.9 and plan.most > 1
    assert plan.rate > 1.2 * speculation.plain_rate(1)
    assert speculation.best_plan(1, (4,)).exit_layer is None, "a request that lets none but the dear exit draft"
    assert speculation.best_plan(8, (2, 4)).rate < 8 * plan.rate


def test_costs_are_expected_from_weights(llama):
    """A segment without a figure, which would look free; layers that cost nothing, or a head that costs all."""
    loaded, _ = llama
    costs = expected_costs(Engine(loaded.model, loaded.stages, num_slots=1, max_length=64).stage)
    assert len(costs.segments) == 3 and set(costs.heads) == {2, 4}
    curves = (*costs.segments, *costs.heads.values(), costs.final_head)
    assert all(0 < curve[0] <= curve[1] <= curve[2] for curve in curves)
    weights = sum(
        p.numel() for n, p in loaded.model.backbone.named_parameters() if "embedding" not in n and p.dim() == 2
    )
    assert costs.of_all(1) == pytest.approx(8 * weights, rel=0.01)
    # five more tokens cost a fifth of a pass each in the cache, and later ones as much: between and beyond COUNTS, too
    assert [costs.of_all(n) / costs.of_all(1) for n in (2, 6, 8, 22)] == pytest.approx([1.2, 2.0, 2.4, 5.2])


@pytest.mark.parametrize(
    ("device", "num_bytes", "costs"),
    [
        ("cpu", CACHE_BYTES - 1, (1.0, 2.0, 4.0)),
        ("cpu", CACHE_BYTES, (1.0, 1.3, 2.5)),
        ("cuda", 0, (1.0, 1.05, 1.15)),
    ],
)
def test_more_tokens_cost_what_reading_the_weights_hides(device: str, num_bytes: int, costs: tuple[float, ...]) -> None:
    """A model in memory that is planned as one in the cache, whose drafts are worth less than they cost."""
    assert COUNTS == (1, 6, 16) and expected_growth(device, num_bytes) == costs
