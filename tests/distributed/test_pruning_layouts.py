"""`ee-tuning prune` measures and writes the same at every layout."""

import json
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning.config import load_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.pruning.command import PruneOptions, layout_of, prune_within
from ee_tuning.storage.manifest import MANIFEST


def pruned_at(folder: str, output: str, tp: int, pp: int, measure: str) -> dict[str, list[str]]:
    """The sums of all files that are written."""
    where = Path(folder)
    keys = {
        "model.path": str(where / "model"),
        "model.dtype": "float64",
        "exits.path": str(where / "exits"),
        "exits.profile_text": str(where / "text.txt"),
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
    }
    options = PruneOptions(
        drop=("auto:2",),
        measure=measure,  # type: ignore[arg-type]
        num_samples=9,
        picture=Path(output + ".png"),
        output=Path(output),
    )
    config = load_config(None, keys)
    prune_within(config, options, init_parallel(layout_of(config)))
    return {
        name: sorted(str(entry) for entry in json.loads((Path(name) / MANIFEST).read_text())["files"].values())
        for name in (output, output + "-exits")
    }


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    random_llama(folder / "model", vocab_size=257, eos_token_id=256, bos_token_id=256)
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits", exit_layers=[1, 6], architecture="norm")
    (folder / "text.txt").write_text("early exits leave early, and deep layers rest. " * 30)
    return folder


@pytest.mark.parametrize(("tp", "pp", "measure"), [(2, 2, "angular"), (1, 4, "perplexity")])
def test_layouts_prune_the_same(world, subject, tmp_path, tp, pp, measure):
    """A sample counted twice or by nobody; logits of one shard; a file that two processes write. The card has the
    losses, so that equal sums mean equal losses.
    """
    where = str(tmp_path / "model")
    wanted = pruned_at(str(subject), where, 1, 1, measure)
    (tmp_path / "model").rename(tmp_path / "one")
    (tmp_path / "model-exits").rename(tmp_path / "one-exits")
    assert world.run(pruned_at, str(subject), where, tp, pp, measure) == [wanted] * 4
