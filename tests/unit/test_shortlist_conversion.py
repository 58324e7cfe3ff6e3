"""Claims about where shortlisted exits begin: which tokens are listed, and which rows their output matrices have."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama
from safetensors.torch import load_file
from torch import Tensor

from ee_tuning.artifact.exit_heads import ExitHeadsReader, read_exit_config
from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.config import Config, load_config
from ee_tuning.data.frequent_tokens import TokenCounts, chosen_size
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.errors import InputError
from ee_tuning.export.export_artifact import ExitChoice, export_artifact
from ee_tuning.model.fit import RIDGE
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import convert_by_texts

TEXT = " ".join(f"the {number} of {number * number} and {number % 7} more" for number in range(400))
SIZE = 12


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("model")
    reference = random_llama(
        folder, vocab_size=257, eos_token_id=256, bos_token_id=256, tie_word_embeddings=request.param == "tied"
    )
    write_byte_tokenizer(folder)
    return folder, reference.double()


def listed_job(model: Path, folder: Path, **keys: object) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    return load_config(
        None,
        {
            "model.path": str(model),
            "exits.exit_layers": [2, 5],
            "exits.architecture": "norm",
            "exits.output_vocab": SIZE,
            "data.paths": [str(folder / "text.txt")],
            "data.cache": str(folder / "cache"),
            "tuning.seq_length": 64,
            "tuning.micro_batch_size": 2,
            "tuning.fit_tokens": 1000,
            "tuning.eval_iters": 0,
            **keys,
        },
    )


def test_the_list_is_the_most_frequent_tokens_and_those_that_end_texts(
    model: tuple[Path, object], tmp_path: Path
) -> None:
    """A list that changes with the machine, an end of text that no exit can say; rows of other tokens, or of another
    matrix.
    """
    folder, reference = model
    config = listed_job(folder, tmp_path)
    convert_by_texts(config, tmp_path / "exits")
    exits, tensors = read_exit_config(tmp_path / "exits"), load_file(tmp_path / "exits" / "exit_heads.safetensors")
    samples = load_job_samples(config, read_shape(config.model), init_parallel(config.parallel)).train
    counts = Counter(np.concatenate([samples.sample(i).tokens[1:] for i in range(len(samples))]).tolist())
    frequent = sorted(counts, key=lambda token: (-counts[token], token))
    wanted = sorted({256, *[token for token in frequent if token != 256][: SIZE - 1]})
    assert list(exits.token_ids) == wanted and exits.output == "untied"
    assert exits.output_vocab == {
        "size": SIZE,
        "tokens": counts.total(),
        "share": round(sum(counts[token] for token in wanted) / counts.total(), 6),
    }
    matrix = reference.lm_head.weight.detach().float()
    others = [token for token in range(257) if token not in wanted]
    for layer in (2, 5):
        rows = tensors[f"exits.{layer}.output.weight"]
        assert torch.equal(rows[:-1], matrix[wanted])
        torch.testing.assert_close(rows[-1], matrix[others].mean(0))


def test_a_fit_takes_the_listed_rows_and_a_row_of_the_others(model: tuple[Path, object], tmp_path: Path) -> None:
    """A map that is folded into rows of other tokens, or a row of the others that says nothing of them."""
    folder, reference = model
    config = listed_job(folder, tmp_path, **{"exits.init": "fitted"})
    convert_by_texts(config, tmp_path / "exits")
    convert_by_texts(load_config(None, {**as_keys(config), "exits.output_vocab": 0}), tmp_path / "whole")
    exits = read_exit_config(tmp_path / "exits")
    got, whole = (load_file(tmp_path / name / "exit_heads.safetensors") for name in ("exits", "whole"))
    row = weighted_row(config, reference, exits.token_ids, exits.fitted["tokens"])
    output = reference.lm_head.weight.detach()
    for layer in (2, 5):
        name = f"exits.{layer}.output.weight"
        torch.testing.assert_close(got[name][:-1], whole[name][list(exits.token_ids)], rtol=1e-4, atol=1e-5)
        folded = torch.linalg.lstsq(output, whole[name].double()).solution  # T of W T
        torch.testing.assert_close(got[name][-1].double(), row @ folded, rtol=1e-3, atol=1e-3)


def weighted_row(config: Config, reference: object, ids: tuple[int, ...], num_tokens: int) -> Tensor:
    """By hand, from transformers' final states."""
    samples = load_job_samples(config, read_shape(config.model), init_parallel(config.parallel)).train
    order, chosen, others = samples.order(config.tuning.seed), [], [token for token in range(257) if token not in ids]
    while sum(samples.sample(i).loss_mask.sum() for i in chosen) < num_tokens:
        chosen.append(order.sample_at(len(chosen)))
    with torch.no_grad():
        out = reference(
            torch.from_numpy(np.stack([samples.sample(i).tokens[:-1] for i in chosen])), output_hidden_states=True
        )
    states, logits = out.hidden_states[-1].flatten(0, 1), out.logits.flatten(0, 1)
    target, p = logits[:, others].logsumexp(-1), logits.softmax(-1)[:, others].sum(-1)
    gram = states.T @ (states * (p * (1 - p))[:, None])
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, states.T @ (p * (1 - p) * target))


def as_keys(config: Config) -> dict[str, object]:
    return {
        "model.path": config.model.path,
        "exits.exit_layers": [2, 5],
        "exits.architecture": "norm",
        "exits.init": "fitted",
        "data.paths": list(config.data.paths),
        "data.cache": config.data.cache,
        "tuning.seq_length": 64,
        "tuning.micro_batch_size": 2,
        "tuning.fit_tokens": 1000,
        "tuning.eval_iters": 0,
    }


@pytest.fixture(scope="module")
def artifact(model: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exits(model[0], tmp_path_factory.mktemp("artifact") / "exits", (3, 4, 7, 90, 256), architecture="norm")


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([3, 4, 7, 90], "5 token ids"),
        ([3, 4, 7, 7, 256], "7 behind 7"),
        ([4, 3, 7, 90, 256], "3 behind 4"),
        ([3, 4, 7, 90, 257], "vocabulary of 257"),
        ([-1, 3, 4, 7, 256], "-1"),
        ("3", "a list"),
        ([3, 4, 7.0, 90, 256], "a list"),
        (None, "can not be read"),
    ],
    ids=str,
)
def test_a_list_that_makes_no_sense_is_refused(artifact: Path, tmp_path: Path, ids: object, told: str) -> None:
    """Tokens of one class said as another's, without a word."""
    folder = tmp_path / "exits"
    shutil.copytree(artifact, folder)
    path = folder / "exit_vocab.json"
    path.unlink() if ids is None else path.write_text(json.dumps({"token_ids": ids}))
    with pytest.raises(InputError) as caught:
        ExitHeadsReader(folder, verifies=False)
    assert str(path) in str(caught.value) and told in str(caught.value)


def test_the_list_is_part_of_what_a_calibration_is_bound_to(
    model: tuple[Path, object], artifact: Path, tmp_path: Path
) -> None:
    """Thresholds of other classes, taken for those of these heads, whose tensors are the same."""
    other = write_exits(model[0], tmp_path / "other", (3, 4, 7, 91, 256), architecture="norm")
    with ExitHeadsReader(artifact) as one, ExitHeadsReader(other) as two:
        assert one.digest != two.digest


def test_artifacts_of_different_lists_are_not_merged_and_new_exits_share_the_list(
    model: tuple[Path, object], artifact: Path, tmp_path: Path
) -> None:
    """Exits of one artifact that mean different tokens by the same row."""
    other = write_exits(model[0], tmp_path / "other", (3, 4, 7, 91, 256), architecture="norm", exit_layers=[3])
    config = load_config(None, {"model.path": str(model[0]), "exits.path": str(artifact)})
    with pytest.raises(InputError, match="the same shortlist"):
        export_artifact(config, tmp_path / "merged", ExitChoice(merge=other))
    export_artifact(config, tmp_path / "more", ExitChoice(only=(2,), add=(3,)))
    with ExitHeadsReader(tmp_path / "more") as more:
        assert more.config.token_ids == (3, 4, 7, 90, 256) and more.shape("exits.3.output.weight") == (6, 48)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"exits.output_vocab": 257}, "vocabulary of 257, got 257"),
        ({"exits.output_vocab": -1}, "at least 1"),
        ({"exits.output_vocab": 1}, "special and stop tokens"),
        ({"exits.output": "tied"}, "exits.output must be untied"),
        ({"data.paths": []}, "data.paths names none"),
    ],
    ids=str,
)
def test_a_list_that_can_not_be_is_refused(
    model: tuple[Path, object], tmp_path: Path, keys: dict[str, object], told: str
) -> None:
    """An artifact half written; a size past the vocabulary cut down in silence."""
    with pytest.raises(InputError, match=told):
        convert_by_texts(listed_job(model[0], tmp_path, **keys), tmp_path / "exits")
    assert not (tmp_path / "exits").exists()


def test_auto_weighs_what_asking_costs_against_tokens_that_can_not_leave(tmp_path: Path) -> None:
    """A list that grows with the vocabulary whatever a text uses of it, or one that a text of rare words is cut down
    to.
    """
    random_llama(tmp_path / "model", vocab_size=40000, num_hidden_layers=2)
    shape = read_model_config(tmp_path / "model")
    config = load_config(None, {"exits.exit_layers": [1], "exits.output_vocab": "auto"})
    few = np.zeros(40000, dtype=np.int64)
    few[:1500] = 1000
    assert chosen_size(config, shape, TokenCounts(few, frozenset({39999}))) == 2048
    assert chosen_size(config, shape, TokenCounts(np.ones(40000, dtype=np.int64), frozenset())) in (1024, 40000)
