"""Sequences that go through the frozen layers in chunks: the losses and gradients of whole ones, in less memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import random_model
from tuning_jobs import checkpoint, configure, make_samples, records, tune

from ee_tuning import config as job
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.artifact.shapes import with_seq_length
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.data.tokens import DocumentRules, PackedSamples, Splits
from ee_tuning.errors import InputError
from ee_tuning.model.sequence_chunk import KeyValueCache, SequenceChunk
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.fitting import fit_exits
from ee_tuning.tuning.settings import check_settings
from ee_tuning.tuning.tuner import Tuner

pytestmark = pytest.mark.slow

KINDS = ("norm", "layer", "mlp", "linear", "adapter", "embedding")
PACKED = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotary positions and grouped queries; learned positions and biases."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(request.param, folder)
    return folder


def job_of(model: Path, run: Path, chunk: int, *, exits: dict[str, Any] | None = None, **tuning: Any) -> Config:
    settings = {"train_iters": 1, "micro_batch_size": 2, "global_batch_size": 4, "eval_iters": 1, "save_interval": 1}
    config = configure(
        model, run, exits=(1, 2, 3, 4, 5, 6), forward_chunk_length=chunk, **{**settings, "seq_length": 24, **tuning}
    )
    return job.replace(config, exits=exits or {"architecture": KINDS, "adapter_rank": 7})


def assert_same(got: Config, wanted: Config) -> None:
    """Records and, after a step, a tenth of each clipped gradient, up to rounding in float64."""
    for one, other in zip(records(got), records(wanted), strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for key, value in other.items():
            assert one[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), key
    first, expected = checkpoint(got, 1), checkpoint(wanted, 1)
    for name in expected:
        torch.testing.assert_close(first[name], expected[name], rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("llama", {"loss": ("cross_entropy", "forward_kl"), "teacher": "top_k", "teacher_top_k": 7}), ("gpt2", {})],
    indirect=["model"],
)
def test_chunks_take_the_steps_of_whole_sequences(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A chunk that does not see the ones before it or sees later ones, positions that begin anew, keys of the
    micro-batch before; a head with attention that takes a chunk for the sequence; a step after every chunk; a lesson of
    another chunk.
    """
    whole, chunked = (job_of(model, tmp_path / str(chunk), chunk, **settings) for chunk in (0, 6))
    assert tune(whole) and tune(chunked)
    assert_same(chunked, whole)


def tune_packed(config: Config) -> None:
    """Documents of 1 to 30 tokens, several in a row of 24 and some over three chunks of it."""
    Path(config.tuning.run_folder).mkdir(parents=True, exist_ok=True)
    draw, length = np.random.RandomState(3), config.tuning.seq_length
    tokens = draw.randint(0, 101, 20 * length + 1).astype(np.int32)
    starts = np.concatenate(([0], np.cumsum(draw.randint(1, 31, 16)).astype(np.int64)))
    samples = PackedSamples(tokens, length, starts=starts, rules=DocumentRules(**PACKED))
    topology = init_parallel(config.parallel)
    assert Tuner(load_for_tuning(config, topology), Splits(train=samples, valid=samples), config, topology).run()


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_documents_stay_apart_over_chunks(model: Path, tmp_path: Path) -> None:
    """A document that goes on in the next chunk and loses its beginning, or reads its neighbour's."""
    whole, chunked = job_of(model, tmp_path / "whole", 0), job_of(model, tmp_path / "chunked", 6)
    tune_packed(whole)
    tune_packed(chunked)
    assert_same(chunked, whole)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_drafting_head_takes_whole_sequences(model: Path, tmp_path: Path) -> None:
    """Drafts that end with each chunk, states of the layers read that are joined in another order."""
    eagle = {"exit_layers": (), "architecture": ("eagle3",), "aux_layers": (1, 3, 5)}
    settings = {"loss": ("lk", "forward_kl=0.2"), "compare_final": True}
    whole, chunked = (job_of(model, tmp_path / str(chunk), chunk, exits=eagle, **settings) for chunk in (0, 8))
    assert tune(whole) and tune(chunked)
    assert_same(chunked, whole)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_fit_in_chunks_finds_the_maps_of_whole_sequences(model: Path, tmp_path: Path) -> None:
    """Final states of the chunk before, a `layer` head that is fitted to a chunk's beginning."""
    exits = {"architecture": KINDS, "adapter_rank": 7, "init": "fitted", "output": "untied"}
    whole, chunked = (
        fit_exits(config, make_samples(24).train, init_parallel(ParallelSection()), 48).maps
        for config in (job_of(model, tmp_path, chunk, exits=exits) for chunk in (0, 8))
    )
    for layer, wanted in whole.items():
        torch.testing.assert_close(chunked[layer], wanted, rtol=1e-5, atol=1e-6, msg=f"the exit after layer {layer}")


def test_the_kernel_is_given_the_tokens_that_the_mask_shows() -> None:
    """Bounds for the GPU's kernel that begin a document in the wrong row or count keys of the next one: it sees, of
    each run's keys, those up to its query, counted from the end.
    """
    lengths = ((5, 1, 9, 6), (13, 8), (21,))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    for known in (ids, None):
        for start in range(0, 21, 7):
            chunk = SequenceChunk.between(
                start, start + 7, known, None, shape=(3, 21), cache=KeyValueCache(), device=torch.device("cpu")
            )
            assert chunk.starts is not None and chunk.positions is not None
            assert chunk.positions.tolist() == [list(range(start, start + 7))]
            seen = torch.zeros(3, 7, 3 * 21, dtype=torch.bool)
            for run, (first, stop) in enumerate(
                zip(chunk.starts[:-1].tolist(), chunk.starts[1:].tolist(), strict=True)
            ):
                key, count = int(chunk.key_starts[run]), int(chunk.key_counts[run])
                assert stop - first <= chunk.longest and count <= chunk.longest_keys
                for query in range(first, stop):
                    seen[query // 7, query % 7, key : key + count - (stop - 1 - query)] = True
            mask = chunk.mask
            for row in range(3):
                others = torch.cat((seen[row, :, : row * 21], seen[row, :, row * 21 + start + 7 :]), dim=1)
                own = seen[row, :, row * 21 : row * 21 + start + 7]
                wanted = (
                    torch.ones(7, 7, dtype=torch.bool).tril() if mask is None else mask.expand(3, 1, -1, -1)[row, 0]
                )
                assert not others.any() and torch.equal(own, wanted)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
@pytest.mark.parametrize("asked", [5, 48])
def test_a_chunk_that_does_not_divide_the_sequence_is_refused(model: Path, asked: int) -> None:
    """A last chunk of another shape, which the next stage does not expect."""
    keys = {"exits.exit_layers": [2], "tuning.seq_length": 24, "tuning.forward_chunk_length": asked}
    config = load_config(None, {"model.path": str(model), **keys})
    says = f"must divide tuning.seq_length = 24, got {asked}; give a divisor, or 0"
    with pytest.raises(InputError, match=says):
        load_for_tuning(config, init_parallel(config.parallel))


@pytest.mark.parametrize(
    ("length", "asked", "tp", "taken"),
    [
        (8192, 0, 1, 0),
        (12288, 0, 8, 4096),
        (32768, 0, 1, 4096),
        (32768, 2048, 1, 2048),
        (10000, 0, 1, 0),
        (12288, 0, 3, 0),
    ],
)
def test_long_sequences_are_cut_without_being_asked(length: int, asked: int, tp: int, taken: int) -> None:
    """A run at 32k that does not fit until a key is found, a chunk that a layout can not cut."""
    keys = {"tuning.seq_length": length, "tuning.forward_chunk_length": asked}
    config = load_config(None, {"model.path": "x", "parallel.tensor_model_parallel_size": tp, **keys})
    assert with_seq_length(config).tuning.forward_chunk_length == taken


def test_a_model_that_is_trained_takes_whole_sequences() -> None:
    """Chunks whose keys and values have no gradient, under layers that are trained."""
    keys = {"model.path": "x", "tuning.seq_length": 32768, "tuning.trainable": "lora"}
    assert with_seq_length(load_config(None, keys)).tuning.forward_chunk_length == 0
    asked = load_config(None, {**keys, "tuning.forward_chunk_length": 4096})
    with pytest.raises(InputError, match="4096 is for frozen layers"):
        check_settings(asked.tuning)
