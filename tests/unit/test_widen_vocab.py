"""Claims about a shortlist that is made longer: which tokens join it, and that nothing else changes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama
from safetensors.torch import load_file

from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.cli import main
from ee_tuning.config import load_config
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import convert_by_texts

LISTED = (3, 4, 7, 90, 256)
SIZE = 20
TEXT = " ".join(f"the {number} of {number * number} and {number % 7} more" for number in range(400))
KINDS = {
    "exits": {"architecture": "norm,mlp", "exit_layers": [2, 5], "init": "copy"},
    "drafter": {"architecture": "eagle3", "exit_layers": [], "aux_layers": [1, 3, 5], "init": "copy"},
    "drawn": {"architecture": "adapter", "exit_layers": [2, 5], "init": "random"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, texts, and heads of it with a list, all by the names that tests' arguments have for them."""
    folder = tmp_path_factory.mktemp("places")
    for name, seed in (("MODEL", 0), ("OTHER", 1)):
        random_llama(folder / name, seed=seed, vocab_size=257, eos_token_id=256, bos_token_id=256)
        write_byte_tokenizer(folder / name)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, keys in KINDS.items():
        words = {**keys, "architecture": str(keys["architecture"]).split(",")}
        write_exits(folder / "MODEL", folder / name, LISTED, **words)
    write_exits(folder / "MODEL", folder / "whole")
    for name, content in (("far.json", "[300]"), ("known.json", "[3, 4]"), ("words.json", '["a"]'), ("bad.json", "[")):
        (folder / name).write_text(content, encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


def widen(places: dict[str, Path], kind: str, output: Path, *arguments: str) -> int:
    given = ["convert", "--model", str(places["MODEL"]), "--widen", str(places[kind]), "--output", str(output)]
    return main([*given, *arguments])


def by_texts(places: dict[str, Path], tmp_path: Path) -> list[str]:
    length = ["--seq-length", "64", "--set", f"data.cache={tmp_path / 'cache'}"]
    return ["--output-vocab", str(SIZE), "--data", str(places["text.txt"]), *length]


@pytest.mark.parametrize("kind", KINDS)
def test_frequent_tokens_join_the_list_and_all_else_stays(places: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Rows that move to other tokens, trained ones that are initialized again, or a list that loses a rare token."""
    assert widen(places, kind, tmp_path / "out", *by_texts(places, tmp_path)) == 0
    config = load_config(
        None,
        {
            "model.path": str(places["MODEL"]),
            "data.paths": [str(places["text.txt"])],
            "data.cache": str(tmp_path / "cache"),
            "tuning.seq_length": 64,
            "tuning.eval_iters": 0,
        },
    )
    samples = load_job_samples(config, read_shape(config.model), init_parallel(config.parallel)).train
    counts = Counter(np.concatenate([samples.sample(i).tokens[1:] for i in range(len(samples))]).tolist())
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    wanted = sorted({*LISTED, *[token for token in frequent if token not in LISTED][: SIZE - len(LISTED)]})
    with ExitHeadsReader(places[kind]) as old, ExitHeadsReader(tmp_path / "out") as new:
        assert list(new.config.token_ids) == wanted
        assert new.config.output_vocab == {
            "size": SIZE,
            "tokens": counts.total(),
            "share": round(sum(counts[token] for token in wanted) / counts.total(), 6),
            "widened_from": len(LISTED),
        }
        assert new.config.draft == old.config.draft and new.config.heads[0].output_vocab == SIZE
        matrix = load_file(places["MODEL"] / "model.safetensors")["lm_head.weight"]
        for name in old.names():
            if not name.endswith("output.weight"):
                assert torch.equal(new.full(name), old.full(name))
                continue
            expected = torch.cat((matrix[wanted], old.full(name)[len(LISTED) :]))  # the row of any other token, if any
            places_now = [wanted.index(token) for token in LISTED]
            expected[places_now] = old.full(name)[: len(LISTED)]
            compared = (
                slice(None) if kind != "drawn" else [*places_now, SIZE]
            )  # the rest is no copy of the model's rows
            assert torch.equal(new.full(name)[compared], expected[compared])


def test_the_tokens_of_another_list_join(places: dict[str, Path], tmp_path: Path) -> None:
    """Two lists whose tokens change places, for each was sorted alone."""
    other = write_exits(places["MODEL"], tmp_path / "other", (1, 4, 100, 256), architecture="norm")
    ids = str(other / "exit_vocab.json")
    assert widen(places, "exits", tmp_path / "out", "--token-ids", ids) == 0
    with ExitHeadsReader(tmp_path / "out") as new, ExitHeadsReader(places["exits"]) as old:
        assert new.config.token_ids == (1, 3, 4, 7, 90, 100, 256)
        rows = [new.config.token_ids.index(token) for token in LISTED]
        name = "exits.5.output.weight"
        assert torch.equal(new.full(name)[[*rows, -1]], old.full(name))


def test_rows_that_join_go_through_the_map_that_a_fit_folded_into_the_others(
    places: dict[str, Path], tmp_path: Path
) -> None:
    """An exit whose new tokens are compared with states that its fit has turned: the model's rows are not its own."""
    keys = {
        "model.path": str(places["MODEL"]),
        "exits.exit_layers": [2],
        "exits.architecture": "norm",
        "exits.init": "fitted",
        "data.paths": [str(places["text.txt"])],
        "data.cache": str(tmp_path / "cache"),
        "tuning.seq_length": 64,
        "tuning.micro_batch_size": 8,
        "tuning.fit_tokens": 4000,
        "tuning.eval_iters": 0,
    }
    convert_by_texts(load_config(None, {**keys, "exits.output_vocab": 240}), tmp_path / "exits")
    convert_by_texts(load_config(None, keys), tmp_path / "whole")
    with ExitHeadsReader(tmp_path / "exits") as base, ExitHeadsReader(tmp_path / "whole") as whole:
        missing = [token for token in range(257) if token not in base.config.token_ids][:10]
        matrix = whole.full("exits.2.output.weight")
    (tmp_path / "ids.json").write_text(json.dumps(missing), encoding="utf-8")
    given = {**places, "fitted": tmp_path / "exits"}
    assert widen(given, "fitted", tmp_path / "out", "--token-ids", str(tmp_path / "ids.json")) == 0
    with ExitHeadsReader(tmp_path / "out") as new:
        rows = new.full("exits.2.output.weight")[[new.config.token_ids.index(token) for token in missing]]
    raw = load_file(places["MODEL"] / "model.safetensors")["lm_head.weight"][missing]
    assert (rows - matrix[missing]).norm() < 0.05 * (raw - matrix[missing]).norm()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--widen", "whole", "--output-vocab", "20", "--data", "text.txt"], ["none", "whole vocabulary"]),
        (["--widen", "exits"], ["new size", "--output-vocab"]),
        (["--widen", "exits", "--output-vocab", "20"], ["data.paths", "--token-ids"]),
        (
            ["--widen", "exits", "--output-vocab", "20", "--data", "text.txt", "--micro-batch-size", "0"],
            ["tuning.micro_batch_size", "leave it out"],
        ),
        (["--widen", "exits", "--output-vocab", "5", "--data", "text.txt"], ["more than the 5 tokens", "got 5"]),
        (["--widen", "exits", "--output-vocab", "257", "--data", "text.txt"], ["vocabulary of 257", "257"]),
        (["--widen", "exits", "--token-ids", "far.json"], ["vocabulary of 257", "300"]),
        (["--widen", "exits", "--token-ids", "known.json"], ["does not list", "5"]),
        (["--widen", "exits", "--token-ids", "words.json"], ["JSON list", "exit_vocab.json"]),
        (["--widen", "exits", "--token-ids", "bad.json"], ["bad.json", "not JSON"]),
        (["--widen", "exits", "--token-ids", "nowhere.json"], ["nowhere.json", "can not be read"]),
        (
            ["--widen", "exits", "--token-ids", "far.json", "--output-vocab", "20"],
            ["--token-ids", "exits.output_vocab"],
        ),
        (["--widen", "exits", "--architecture", "mlp"], ["--widen", "exits.architecture"]),
        (["--widen", "exits", "--eagle3", "drafter"], ["--eagle3 and --widen"]),
        (["--widen", "text.txt", "--output-vocab", "20", "--data", "text.txt"], ["exit_config.json"]),
        (["--token-ids", "far.json", "--exit-layers", "2"], ["--widen"]),
        (["--widen", "exits", "--token-ids", "far.json", "--model", "OTHER"], ["bound to", "fingerprint"]),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if value and str(value[0]).startswith("--") else "",
)
def test_a_list_that_would_not_grow_is_refused_in_one_line(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """Heads of another model, a list that silently stays as it is, or a traceback."""
    given = [str(places.get(each, each)) for each in arguments]
    capsys.readouterr()
    assert main(["convert", "--model", str(places["MODEL"]), "--output", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and all(word in told for word in words), told
    assert not (tmp_path / "out").exists()


def test_the_old_artifact_is_not_written_over(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A tuned head that is lost half-way through the command that was to improve it."""
    assert widen(places, "exits", places["exits"], *by_texts(places, tmp_path), "--overwrite") == 2
    assert "would be lost" in capsys.readouterr().err
