"""Passes as a GPU's graphs take them, padded and each token a row of its own, against the walk over rows; without a GPU
(recorded.py).
"""

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exits import loaded_with, write_exits
from random_models import FAMILIES, WITH_EXPERTS, random_model
from recorded import ImitatedGraph, imitate_flash_attention, record_on_cpu

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.decoding import captured_attention, captured_batch, graphs, layer_stack
from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.captured_attention import CapturedAttention, GatheredAttention, PagedAttention, VarlenAttention
from ee_tuning.decoding.captured_batch import COUNTS, GraphCache, padded_count
from ee_tuning.decoding.eager_attention import LayerCache, SlotMapping
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.engine import Engine
from ee_tuning.kernel import calls
from ee_tuning.model import flash
from ee_tuning.model.exit_head import ExitInput

NUM_PLACES = 320
TOGETHER = ([4, 5, 6, 7, 8], [0, 1, 2], [10, 11, 12, 13, 14, 15, 16])
SCATTERED = ([9, 17, 3], [19, 18])
"""Blocks of sequences; each is 16 places."""
PLAIN = [family for family in FAMILIES if family not in WITH_EXPERTS]


def load(folder: Path, family: str = "llama", **exits: object) -> LoadedModel:
    random_model(family, folder / "model")
    written = write_exits(folder / "model", folder / "exits", **exits)
    return loaded_with(folder / "model", written, dtype="float64")


class Subject:
    """Three layers of a model, with caches that hold something already, and a block behind them that is nobody's."""

    def __init__(self, loaded: LoadedModel):
        self.stage = Engine(loaded.model, loaded.stages, num_slots=1, max_length=112).stage
        config = self.stage.config
        shape = (NUM_PLACES + 16, config.num_query_groups, config.kv_channels)
        draw = torch.Generator().manual_seed(0)
        self.kept = [torch.randn(2, *shape, generator=draw, dtype=torch.float64) for _ in range(3)]
        self.caches = [LayerCache(keys=keys.clone(), values=values.clone()) for keys, values in self.kept]
        self.run = LayerStack([self.stage.layers[n] for n in (1, 2, 3)], self.caches)
        self.passes = GraphCache(self.stage.tables, width=config.hidden_size, num_places=NUM_PLACES, bytes_per_place=1)

    def tokens(self, blocks: list[list[int]], starts: list[int], lengths: list[int]) -> AttentionMetadata:
        config = self.stage.config
        rows = [
            SlotMapping(
                index=torch.tensor([block * 16 + i for block in own for i in range(16)]),
                first=own[0] * 16 if own in TOGETHER else None,
            )
            for own in blocks
        ]
        return AttentionMetadata(
            rows,
            starts,
            lengths,
            self.stage.tables,
            num_places=NUM_PLACES,
            graph_cache=self.passes,
            queries_per_group=config.num_attention_heads // config.num_query_groups,
        )

    def outcome(self, hidden: torch.Tensor, tokens: AttentionMetadata) -> list[torch.Tensor]:
        """What the layers give, and what they leave in every place that a sequence may have."""
        for cache, (keys, values) in zip(self.caches, self.kept, strict=True):
            cache.keys.copy_(keys)
            cache.values.copy_(values)
        out, inner = self.run(hidden, tokens)
        assert inner.residual is not None
        left = [x[:NUM_PLACES] for cache in self.caches for x in (cache.keys, cache.values)]
        return [x.clone() for x in (out, inner.hidden, inner.residual, *left)]

    def states(self, count: int) -> torch.Tensor:
        return torch.randn(
            count, self.stage.config.hidden_size, generator=torch.Generator().manual_seed(count), dtype=torch.float64
        )


def mixture(rng: random.Random, *, is_scattered: bool) -> tuple[list[list[int]], list[int], list[int]]:
    """Blocks, starts and lengths of some rows."""
    blocks = rng.sample(TOGETHER + (SCATTERED if is_scattered else ()), rng.randrange(1, 4))
    starts = [rng.randrange(len(own) * 16) for own in blocks]
    lengths = [
        rng.randrange(1, 1 + min(rng.choice([1, 4, 20]), len(own) * 16 - start))
        for own, start in zip(blocks, starts, strict=True)
    ]
    return blocks, starts, lengths


@pytest.mark.parametrize("way", [GatheredAttention, VarlenAttention, PagedAttention])
@pytest.mark.parametrize("family", PLAIN)
def test_padded_passes_are_the_walk_over_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, way: type
) -> None:
    """A token that sees its neighbour's sequence, one too many or too few of its own, or not those of its own pass;
    padding that writes to a place of somebody's; a residual overwritten while an exit needs it.
    """
    rng, loaded = random.Random(family), load(tmp_path, family)
    cases = [mixture(rng, is_scattered=way is not VarlenAttention) for _ in range(25)]
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    plain = Subject(loaded)
    assert not plain.run._is_recordable
    wanted = [plain.outcome(plain.states(sum(case[2])), plain.tokens(*case)) for case in cases]
    record_on_cpu(monkeypatch)
    if way is not GatheredAttention:
        imitate_flash_attention(monkeypatch, version=2 if way is VarlenAttention else 3)
    subject = Subject(loaded)
    for case, theirs in zip(cases, wanted, strict=True):
        tokens = subject.tokens(*case)
        assert isinstance(tokens.captured._attention, way)
        for one, other in zip(subject.outcome(subject.states(sum(case[2])), tokens), theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert ImitatedGraph.num_replays == 2 * len(cases)
    assert len({tokens.captured.count for tokens in (subject.tokens(*case) for case in cases)}) > 4


def test_what_a_run_gave_is_not_overwritten_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that wait at a boundary lie in a graph's own memory, and another token's are there when they are
    fetched.
    """
    record_on_cpu(monkeypatch)
    subject = Subject(load(tmp_path))
    states = subject.states(2)
    first, _ = subject.run(states[:1], subject.tokens([TOGETHER[0]], [7], [1]))
    kept = first.clone()
    second, _ = subject.run(states[1:], subject.tokens([TOGETHER[1]], [3], [1]))
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_a_pass_is_told_again_after_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that goes on into deeper layers after another one of its shape went through: it would store keys at the
    other's places.
    """
    record_on_cpu(monkeypatch)
    subject = Subject(load(tmp_path))
    one, other = subject.tokens([TOGETHER[0]], [7], [1]), subject.tokens([TOGETHER[1]], [3], [1])
    wanted = subject.outcome(subject.states(1), one)
    subject.outcome(subject.states(1), other)
    assert one.captured is other.captured
    for mine, theirs in zip(subject.outcome(subject.states(1), one), wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("architecture", ["embedding", "norm", "linear", "mlp", "adapter", "layer"])
def test_recorded_heads_are_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """Answers of the pass before, or of padding; a residual that the graph does not read anew."""
    loaded = load(tmp_path, architecture=architecture)
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    plain = Subject(loaded)
    record_on_cpu(monkeypatch)
    recorded = Subject(loaded)
    for count in (5, 1, 5, 7, 40, COUNTS[-1] + 1):
        states, residual = plain.states(count), plain.states(2 * count)[count:]
        inputs = ExitInput(states, residual=residual, layer_output=residual)
        for layer, head in plain.stage.heads.items():
            for one, other in zip(recorded.stage.heads[layer].ask(inputs), head.ask(inputs), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert ImitatedGraph.num_replays == 3 * 5


def test_each_pass_takes_the_best_that_suits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered blocks given to a kernel that reads on from the first one; a copy of more keys than there is memory
    for; the end of a long prompt whose tokens each read all of it.
    """
    record_on_cpu(monkeypatch)
    imitate_flash_attention(monkeypatch, version=2)
    subject = Subject(load(tmp_path))

    def way(blocks: list[list[int]], start: int) -> type | None:
        captured = subject.tokens(blocks, [start] * len(blocks), [1] * len(blocks)).captured
        return None if captured is None else type(captured._attention)

    assert way([TOGETHER[0], TOGETHER[1]], 40) is VarlenAttention
    assert way([TOGETHER[0], SCATTERED[0]], 40) is GatheredAttention
    monkeypatch.setattr(captured_attention, "MOST_GATHERED", 2 * 64 - 1)
    assert way([TOGETHER[0], SCATTERED[0]], 40) is None and way([SCATTERED[0]], 40) is GatheredAttention
    got = subject.outcome(subject.states(2), subject.tokens([TOGETHER[0], SCATTERED[0]], [40, 40], [1, 1]))
    assert len(got) == 9
    monkeypatch.setattr(captured_batch, "MOST_REREAD", 3 * 44)
    assert (
        subject.tokens([TOGETHER[0]], [40], [4]).captured is not None
        and subject.tokens([TOGETHER[0]], [40], [5]).captured is None
    )
    assert [padded_count(n) for n in (1, 3, 16, 17, 256, 257)] == [1, 4, 16, 24, 256, None]


@pytest.mark.parametrize("way", [VarlenAttention, PagedAttention])
@pytest.mark.parametrize("per_group", [1, 4])
def test_flash_attention_takes_what_it_is_given(way: type[CapturedAttention], per_group: int) -> None:
    """An argument that torch's own function does not know, which no stand-in would tell."""
    if way is PagedAttention and "block_table" not in flash._parameters(flash.varlen_attn()):
        pytest.skip("this torch has no attention by blocks")
    attention, tensor = way(128), {"device": "meta", "dtype": torch.bfloat16}
    positions, blocks = (
        torch.empty(*shape, dtype=torch.int32, device="meta") for shape in ((4,), (4, attention.num_blocks))
    )
    cache = LayerCache(keys=torch.empty(320, 2, 64, **tensor), values=torch.empty(320, 2, 64, **tensor))
    query = torch.empty(4, 2, per_group + 1, 64, **tensor)[:, :, :-1]
    out = attention.attend(query, cache, attention.prepared(positions, blocks, torch.bfloat16), 0.125)
    assert out.shape == (4, 2 * per_group * 64) and out.dtype == torch.bfloat16


def test_graphs_serve_a_gpu_unless_they_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that tries to record, or a switch that nobody reads."""
    gpu, cpu = (SimpleNamespace(device=torch.device(name), tp=1) for name in ("cuda", "cpu"))
    assert graphs.is_supported(gpu) and not graphs.is_supported(cpu)
    monkeypatch.setenv(graphs.SWITCH, "0")
    assert not graphs.is_supported(gpu)


def test_layers_with_experts_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that gives every token to the experts of the token it was recorded with."""
    record_on_cpu(monkeypatch)
    subject = Subject(load(tmp_path, "qwen3_moe", architecture="norm"))
    assert [subject.stage.layers[n].is_recordable for n in (2, 3, 4)] == [
        False,
        True,
        False,
    ] and not subject.run._is_recordable


def test_compiled_layers_are_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a compiled layer stores in a copy of the cache; a graph of one layer's weights for all of them."""
    rng, loaded = random.Random(7), load(tmp_path)
    cases = [case for case in (mixture(rng, is_scattered=True) for _ in range(60)) if sum(case[2]) <= 2]
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    plain = Subject(loaded)
    wanted = [plain.outcome(plain.states(sum(case[2])), plain.tokens(*case)) for case in cases]
    record_on_cpu(monkeypatch)
    monkeypatch.setenv(graphs.SWITCH, "fused")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    layer_stack._compiled.cache_clear()
    subject = Subject(loaded)
    for case, theirs in zip(cases, wanted, strict=True):
        for one, other in zip(
            subject.outcome(subject.states(sum(case[2])), subject.tokens(*case)), theirs, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    layer_stack._compiled.cache_clear()
    assert len(cases) > 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * 2 * 2
