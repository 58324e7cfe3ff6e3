"""The kernels against torch's operators over the same layers and heads, on shapes that fill no vector; and what they
promise beyond.
"""

from pathlib import Path

import pytest
import torch
from exits import loaded_with, write_exits
from random_models import FAMILIES, WITH_EXPERTS, random_model

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.eager_attention import LayerCache, SlotMapping
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.engine import Engine
from ee_tuning.kernel import build, calls
from ee_tuning.model.exit_head import ExitInput

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")

PLACES = 160
NATIVE = [family for family in FAMILIES if family not in WITH_EXPERTS]
BLOCKS = ([4, 5, 6, 7], [0, 3, 2, 1], [9, 8])
"""Of three sequences, 16 places each: one after the other, and scattered."""
PASSES = [
    ([0], [1]),
    ([37], [1]),
    ([0], [32]),
    ([30], [7]),
    ([15, 40, 3], [1, 1, 1]),
    ([0, 17, 20], [5, 3, 9]),
    ([60, 0, 28], [4, 2, 4]),
]
"""(starts, lengths)"""


def assert_close(one: torch.Tensor, other: torch.Tensor, dtype: str) -> None:
    """In bfloat16 as a whole: torch rounds what comes between two operators, the kernels between two layers alone."""
    if dtype == "bfloat16":
        assert (one.float() - other.float()).norm() <= 0.03 * other.float().norm()
    else:
        torch.testing.assert_close(one, other, **({"rtol": 2e-4, "atol": 2e-5} if dtype == "float32" else {}))


def load(folder: Path, family: str = "llama", dtype: str = "float32", **exits: object) -> LoadedModel:
    random_model(family, folder / "model")
    written = write_exits(folder / "model", folder / "exits", **exits)
    return loaded_with(folder / "model", written, dtype=dtype)


class Subject:
    """The first four layers of a model, with caches that hold something already."""

    def __init__(self, loaded: LoadedModel):
        self.stage = Engine(loaded.model, loaded.stages, num_slots=1, max_length=128).stage
        config, self.dtype = self.stage.config, loaded.model.plan.dtype
        draw = torch.Generator().manual_seed(0)
        shape = (PLACES, config.num_query_groups, config.kv_channels)
        self.kept = [torch.randn(2, *shape, generator=draw, dtype=self.dtype) for _ in range(4)]
        index = [torch.tensor([block * 16 + i for block in blocks for i in range(16)]) for blocks in BLOCKS]
        self.rows = [
            SlotMapping(index=places, first=int(places[0]) if i == 0 else None) for i, places in enumerate(index)
        ]

    def run(self, hidden: torch.Tensor, rows: list[int], starts: list[int], lengths: list[int]) -> list[torch.Tensor]:
        """What the layers give, and what they leave in their caches."""
        config = self.stage.config
        caches = [LayerCache(keys=keys.clone(), values=values.clone()) for keys, values in self.kept]
        tokens = AttentionMetadata(
            [self.rows[i] for i in rows],
            starts,
            lengths,
            self.stage.tables,
            num_places=PLACES,
            queries_per_group=config.num_attention_heads // config.num_query_groups,
        )
        out, inner = LayerStack([self.stage.layers[n] for n in (1, 2, 3, 4)], caches)(hidden, tokens)
        assert inner.residual is not None
        return [out, inner.hidden, inner.residual, *(x for cache in caches for x in (cache.keys, cache.values))]

    def states(self, count: int) -> torch.Tensor:
        return torch.randn(
            count, self.stage.config.hidden_size, generator=torch.Generator().manual_seed(count), dtype=self.dtype
        )


@pytest.fixture(scope="module", params=["float32", "float64", "bfloat16"])
def llama(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Subject:
    return Subject(load(tmp_path_factory.mktemp("llama"), dtype=request.param))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("family", NATIVE)
def test_layers_are_those_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str) -> None:
    """A bias, a norm or a rotation forgotten; numbers behind the last whole vector; a place taken for another, a row
    for its neighbour.
    """
    loaded = load(tmp_path, family, dtype)
    native = Subject(loaded)
    assert native.stage.layers[1].is_native
    got = [
        native.run(native.states(sum(lengths)), list(range(len(starts))), starts, lengths) for starts, lengths in PASSES
    ]
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    plain = Subject(loaded)
    assert not plain.stage.layers[1].is_native
    for given, (starts, lengths) in zip(got, PASSES, strict=True):
        wanted = plain.run(plain.states(sum(lengths)), list(range(len(starts))), starts, lengths)
        for one, other in zip(given, wanted, strict=True):
            assert_close(one, other, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("architecture", ["embedding", "norm", "linear", "mlp", "adapter", "layer"])
def test_heads_are_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str
) -> None:
    """Padding of the vocabulary that wins, a probability of other logits, an MLP's output that is not added to what it
    came from.
    """
    loaded = load(tmp_path, dtype=dtype, architecture=architecture, init="random")
    native = Subject(loaded)
    states, residual = native.states(5), native.states(6)[:5]
    inputs = ExitInput(states, residual=residual, layer_output=residual)
    got = {layer: head.ask(inputs) for layer, head in native.stage.heads.items()}
    monkeypatch.setattr(calls, "kernels", lambda *_: None)
    for layer, head in Subject(loaded).stage.heads.items():
        for one, other in zip(got[layer], head.ask(inputs), strict=True):
            if (
                dtype == "bfloat16" and other.dtype == torch.float64
            ):  # torch rounds logits, so that many tie, and its likeliest is another
                one, other = one[:, 1], other[:, 1]
            assert_close(one, other, dtype)
    assert set(got) == {0, 1, 2}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_token_is_the_same_bits_in_any_company(llama: Subject, threads: int) -> None:
    """Sums whose order hangs on how many tokens, rows or threads there are: near ties would fall otherwise in another
    batch.
    """
    starts, lengths = [15, 40, 3], [3, 1, 6]
    hidden = llama.states(sum(lengths))
    alone = []
    for row, (part, start, length) in enumerate(zip(hidden.split(lengths), starts, lengths, strict=True)):
        alone.append(llama.run(part, [row], [start], [length])[0])
    try:
        torch.set_num_threads(threads)
        together = llama.run(hidden, [0, 1, 2], starts, lengths)[0]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(alone), together)


def test_tokens_one_by_one_are_the_bits_of_a_block(llama: Subject) -> None:
    """A check of drafts that gives a token other states than decoding it alone does."""
    hidden = llama.states(4)
    block = llama.run(hidden, [1], [20], [4])[0]
    kept = llama.kept
    one_by_one = []
    try:
        for i in range(4):
            out, _, _, *caches = llama.run(hidden[i : i + 1], [1], [20 + i], [1])
            one_by_one.append(out)
            llama.kept = [torch.stack(caches[n : n + 2]) for n in range(0, 8, 2)]
    finally:
        llama.kept = kept
    assert torch.equal(torch.cat(one_by_one), block)


def test_a_token_is_the_same_bits_in_passes_of_any_length(llama: Subject) -> None:
    """A number of tokens for which the matrices have no group, or that leaves the last of them out."""
    hidden = llama.states(calls.MOST_TOKENS)
    states, *_ = llama.run(hidden, [0], [0], [len(hidden)])
    head = llama.stage.heads[len(llama.stage.segments) - 1]
    answers = head.ask(ExitInput(hidden))
    for count in range(1, len(hidden)):
        assert torch.equal(llama.run(hidden[:count], [0], [0], [count])[0], states[:count]), count
        for got, whole in zip(head.ask(ExitInput(hidden[:count])), answers, strict=True):
            assert torch.equal(got, whole[:count]), count
    for token in range(len(hidden)):
        for got, whole in zip(head.ask(ExitInput(hidden[token : token + 1])), answers, strict=True):
            assert torch.equal(got, whole[token : token + 1]), token


def test_nan_is_no_token_of_certainty(llama: Subject) -> None:
    """A broken model's states that pass for sure of something."""
    states = llama.states(3)
    states[1, 7] = torch.nan
    top = llama.stage.heads[len(llama.stage.segments) - 1].ask(ExitInput(states))[1]
    assert top[1, 1].isnan() and not top[[0, 2]].isnan().any() and 0 <= top[1, 0] < 101
