"""Exits fitted by least squares: the map is the one that solves the problem, lies where it should, and is made where it
is asked for.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import write_byte_tokenizer
from exits import loaded_with, write_exits
from random_models import random_llama
from safetensors.torch import load_file, save_file
from tuning_jobs import configure, make_samples

from ee_tuning import config as job
from ee_tuning.artifact.convert import convert
from ee_tuning.artifact.exit_heads import ExitHeadsReader
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.loader import validation_batches
from ee_tuning.errors import InputError
from ee_tuning.export.export_artifact import ExitChoice, export_artifact
from ee_tuning.model.fit import RIDGE, FitSums, solved_of_rank
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning import command
from ee_tuning.tuning.command import convert_by_texts, tune_within
from ee_tuning.tuning.fitting import fit_exits

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
TEXT = " ".join(f"the {number} of {number * number} and {number % 7} more" for number in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_llama(folder, vocab_size=257, eos_token_id=256, bos_token_id=256)
    write_byte_tokenizer(folder)
    return folder


def fitted_job(model: Path, folder: Path, **keys: object) -> Config:
    (folder / "text.txt").write_text(TEXT)
    (folder / "more.txt").write_text(TEXT[::-1])
    return load_config(
        None,
        {
            "model.path": str(model),
            "exits.exit_layers": [2, 5],
            "exits.architecture": "norm",
            "exits.init": "fitted",
            "exits.output": "tied",
            "data.paths": [str(folder / "text.txt"), str(folder / "more.txt")],
            "data.cache": str(folder / "cache"),
            "tuning.seq_length": 64,
            "tuning.micro_batch_size": 2,
            "tuning.global_batch_size": 2,
            "tuning.fit_tokens": 1000,
            "tuning.train_iters": 3,
            "tuning.run_folder": str(folder / "run"),
            **keys,
        },
    )


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_the_map_solves_the_least_squares_of_transformers_states(tmp_path: Path, output: str) -> None:
    """States of another layer, a final state without its norm, a ridge of another size, tokens that are left out or
    counted twice.
    """
    reference = random_llama(tmp_path / "model").double()
    exits = {"architecture": ("norm",), "init": "fitted", "output": output}
    config = job.replace(configure(tmp_path / "model", tmp_path / "run"), exits=exits)
    samples = make_samples(config.tuning.seq_length).train
    got = fit_exits(config, samples, init_parallel(ParallelSection()), 48)
    rows = torch.stack([torch.from_numpy(samples.sample(index).tokens[:-1]) for index in range(len(samples))])
    last: list[torch.Tensor] = []
    reference.model.layers[-1].register_forward_hook(
        lambda module, given, made: last.append(made[0] if isinstance(made, tuple) else made)
    )
    with torch.no_grad():
        states = reference(rows, output_hidden_states=True).hidden_states
        final = reference.model.norm(last[0]).flatten(0, 1)
        for layer in (2, 5):
            z = reference.model.norm(states[layer]).flatten(0, 1)
            weight = math.sqrt(RIDGE * float(z.square().sum(0).mean()))
            one, zero = (
                torch.ones(len(z), output == "tied", dtype=z.dtype),
                torch.zeros(48, output == "tied", dtype=z.dtype),
            )
            system = torch.cat((torch.cat((z, one), 1), torch.cat((weight * torch.eye(48, dtype=z.dtype), zero), 1)))
            wanted = torch.linalg.lstsq(system, torch.cat((final, torch.zeros(48, 48, dtype=z.dtype)))).solution.T
            torch.testing.assert_close(got.maps[layer][:, : wanted.shape[1]].double(), wanted, rtol=1e-5, atol=1e-6)
            assert output == "tied" or not got.maps[layer][:, -1].any()
    assert got.record == {"tokens": len(samples) * config.tuning.seq_length, "ridge": RIDGE}


def test_a_tied_head_keeps_the_map_and_an_untied_one_folds_it(model: Path, tmp_path: Path) -> None:
    """A map applied from the wrong side, an intercept lost of a head that could keep it, a head that became another
    architecture's.
    """
    tied, untied, words = (
        tmp_path / "tied",
        tmp_path / "untied",
        load_file(model / "model.safetensors")["lm_head.weight"].double(),
    )
    convert_by_texts(fitted_job(model, tmp_path), tied)
    convert_by_texts(fitted_job(model, tmp_path, **{"exits.output": "untied"}), untied)
    kept, folded = load_file(tied / "exit_heads.safetensors"), load_file(untied / "exit_heads.safetensors")
    assert set(kept) == {
        f"exits.{layer}.{name}" for layer in (2, 5) for name in ("norm.weight", "linear.weight", "linear.bias")
    }
    assert set(folded) == {f"exits.{layer}.{name}" for layer in (2, 5) for name in ("norm.weight", "output.weight")}
    topology, job_config = init_parallel(ParallelSection()), fitted_job(model, tmp_path, **{"exits.output": "untied"})
    samples = load_job_samples(job_config, read_shape(job_config.model), topology).train
    maps = fit_exits(job_config, samples, topology, 48).maps
    config = load_config(None, {"model.path": str(model), "exits.path": str(tied), "model.dtype": "float64"})
    stage = load_for_generation(config, topology).model
    with torch.no_grad():
        _, inputs = stage.run_layers(stage.embed(torch.tensor([[5, 17, 80, 3]])))
        for layer in (2, 5):
            torch.testing.assert_close(
                folded[f"exits.{layer}.output.weight"].double(), words @ maps[layer][:, :-1].double()
            )
            z, head = stage.exit_head(layer).own_hidden(inputs[layer]), stage.exit_head(layer)
            wanted = (
                z @ kept[f"exits.{layer}.linear.weight"].double().T + kept[f"exits.{layer}.linear.bias"].double()
            ) @ words.T
            torch.testing.assert_close(head(inputs[layer], F.linear), wanted)
    with ExitHeadsReader(tied) as reader:
        assert (
            reader.config.adds_linear == (2, 5)
            and reader.config.init == "fitted"
            and reader.config.fitted["ridge"] == RIDGE
        )
    with ExitHeadsReader(untied) as reader:
        assert reader.config.adds_linear == ()


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_tuning_that_fits_by_itself_is_tuning_of_what_convert_by_texts(
    model: Path, tmp_path: Path, output: str
) -> None:
    """Other texts, another order, held-out documents that are fitted on, maps that are rounded another way."""
    config = fitted_job(model, tmp_path, **{"exits.output": output, "exits.architecture": "mlp"})
    topology = init_parallel(config.parallel)
    assert tune_within(config, topology)
    convert_by_texts(config, tmp_path / "exits")
    topology = init_parallel(config.parallel)
    other = job.replace(config, exits={"path": str(tmp_path / "exits")}, tuning={"run_folder": str(tmp_path / "other")})
    assert tune_within(other, topology)
    got, wanted = (
        load_file(folder / "exit_heads" / "exit_heads.safetensors") for folder in (tmp_path / "run", tmp_path / "other")
    )
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    told = [
        json.loads((folder / "exit_heads" / "exit_config.json").read_text())
        for folder in (tmp_path / "run", tmp_path / "other")
    ]
    assert told[0] == told[1] and told[0]["fitted"]["tokens"] >= 1000


def test_tune_fits_by_default_and_convert_copies(model: Path, tmp_path: Path) -> None:
    """A default that the command line has and the library has not; a conversion that runs the model unasked; a
    drafting head that is to be fitted.
    """
    config = job.replace(fitted_job(model, tmp_path), exits={"init": "auto"})
    assert tune_within(config, init_parallel(config.parallel))
    tuned = json.loads((tmp_path / "run" / "exit_heads" / "exit_config.json").read_text())
    assert tuned["init"] == "fitted" and tuned["fitted"]["tokens"] >= 1000
    assert load_config(tmp_path / "run" / "config.yaml").exits.init == "fitted"
    convert(config, tmp_path / "converted")
    converted = json.loads((tmp_path / "converted" / "exit_config.json").read_text())
    assert converted["init"] == "copy" and converted["fitted"] is None
    drafter = job.replace(config, exits={"exit_layers": (), "architecture": ("eagle3",)}).exits
    assert drafter.init_of_tune == "copy"


def test_a_run_that_goes_on_fits_no_more(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that is made again at every start, and then thrown away for the checkpoint's heads."""
    config = fitted_job(model, tmp_path, **{"tuning.lr_decay_style": "constant", "tuning.lr_warmup_fraction": 0.0})
    whole = job.replace(config, tuning={"run_folder": str(tmp_path / "whole"), "train_iters": 4})
    assert tune_within(whole, init_parallel(config.parallel)) and tune_within(config, init_parallel(config.parallel))
    monkeypatch.setattr(command, "fit_exits", lambda *_: pytest.fail("fitted again"))
    further = job.replace(config, tuning={"train_iters": 4, "allow_config_change": True})
    assert tune_within(further, init_parallel(config.parallel))
    assert all(
        (tmp_path / "run" / "exit_heads" / name).read_bytes() == (tmp_path / "whole" / "exit_heads" / name).read_bytes()
        for name in ("exit_heads.safetensors", "exit_config.json")
    )


def test_fitted_and_copied_exits_become_one_artifact(model: Path, tmp_path: Path) -> None:
    """Maps that are lost on the way, or expected of an exit that has none."""
    convert_by_texts(fitted_job(model, tmp_path), tmp_path / "fitted")
    write_exits(model, tmp_path / "copied", exit_layers=[3], architecture="norm", init="copy", output="tied")
    config = load_config(None, {"model.path": str(model), "exits.path": str(tmp_path / "fitted")})
    export_artifact(config, tmp_path / "both", ExitChoice(merge=tmp_path / "copied"))
    with ExitHeadsReader(tmp_path / "both") as reader:
        reader.check_complete(read_model_config(model))
        exits = reader.config
    assert (
        exits.adds_linear == (2, 5)
        and [head.has_linear for head in exits.heads] == [True, False, True]
        and exits.fitted is None
    )
    assert exits.origins is not None and [exits.origins[layer]["init"] for layer in ("2", "3", "5")] == [
        "fitted",
        "copy",
        "fitted",
    ]
    assert exits.origins["2"]["fitted"]["tokens"] >= 1000 and "fitted" not in exits.origins["3"]
    export_artifact(
        job.replace(config, exits={"path": str(tmp_path / "both")}), tmp_path / "again", ExitChoice(drop=(3,))
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "fitted").iterdir()
    }


def test_fitted_exits_of_the_shipped_model_are_better_than_copied_ones(tmp_path: Path) -> None:
    """A map that fits its own texts and nothing else; one that makes states alike and words apart."""
    sources = sorted((Path(__file__).parents[2] / "ee_tuning" / "artifact").glob("e*.py"))
    config = fitted_job(
        SHIPPED,
        tmp_path,
        **{
            "exits.exit_layers": [3, 6, 9],
            "tuning.fit_tokens": 8000,
            "tuning.eval_iters": 4,
            "data.paths": [str(path) for path in sources[1:]],
            "data.valid_paths": [str(sources[0])],
        },
    )
    convert_by_texts(config, tmp_path / "exits")
    topology = init_parallel(ParallelSection())
    stage = load_for_generation(job.replace(config, exits={"path": str(tmp_path / "exits")}), topology).model
    losses: dict[int, list[float]] = {3: [0, 0], 6: [0, 0], 9: [0, 0]}
    with torch.inference_mode():
        samples = load_job_samples(config, read_shape(config.model), topology).valid
        for batch in validation_batches(samples, config.tuning, dp=1, dp_rank=0):
            _, inputs = stage.run_layers(stage.embed(batch.tokens))
            for layer, (copied, fitted) in losses.items():
                head = stage.exit_head(layer)
                of_copy = F.linear(head.own_hidden(inputs[layer]), head.output_weight)
                both = [
                    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()
                    for logits in (of_copy, head(inputs[layer], F.linear))
                ]
                losses[layer] = [copied + both[0], fitted + both[1]]
    for layer, (copied, fitted) in losses.items():
        assert fitted < copied, layer


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data.paths": []}, ["data.paths", "--data"]),
        ({"tuning.fit_tokens": 40}, ["at least 49", "fit_tokens = 40"]),
        ({"tuning.fit_tokens": -1}, ["tuning.fit_tokens", "-1"]),
        ({"tuning.micro_batch_size": 0}, ["micro_batch_size", "0"]),
        ({"tuning.seq_length": 500}, ["1..128", "500"]),
    ],
)
def test_what_can_not_be_fitted_is_refused(
    model: Path, tmp_path: Path, keys: dict[str, object], words: list[str]
) -> None:
    """A system with more unknowns than tokens is solved by its ridge alone."""
    config = fitted_job(model, tmp_path, **{"tuning.seq_length": 8, **keys})
    with pytest.raises(InputError) as error:
        convert_by_texts(config, tmp_path / "exits")
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert not (tmp_path / "exits").exists() and not list(tmp_path.glob("*partial*"))


def test_states_that_are_no_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    """A NaN among the sums makes every map NaN."""
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="finite"):
        convert_by_texts(fitted_job(broken, tmp_path), tmp_path / "exits")
    assert not (tmp_path / "exits").exists()


@pytest.mark.parametrize("rank", [1, 5, 16, 20])
def test_a_map_of_low_rank_is_that_of_reduced_rank_regression(rank: int) -> None:
    """The map of full rank cut by its own singular values, which knows nothing of how far states reach in which
    direction; a mean that is squeezed through the rank; a rank above the width.
    """
    draws, width, num = np.random.default_rng(1), 16, 400
    z = draws.normal(size=(num, width)) @ draws.normal(size=(width, width)) + draws.normal(size=width)
    y = z @ draws.normal(size=(width, width)) * 0.3 + draws.normal(size=(num, width)) + 3 * draws.normal(size=width)
    sums = FitSums(width, torch.device("cpu"))
    sums.add(torch.from_numpy(z), torch.from_numpy(y), torch.ones(num, dtype=torch.float64))
    found = solved_of_rank(sums.whole(), rank).numpy()
    up, down, bias = found[:, :rank], found[:, rank:-1].T, found[:, -1]

    weight = np.sqrt(RIDGE * np.square(z).sum(0).mean())
    states, change = (np.vstack((x - x.mean(0), np.zeros((width, width)))) for x in (z, y - z))
    states[num:] = weight * np.eye(width)  # a ridge is so many more observations
    plain = np.linalg.lstsq(states, change, rcond=None)[0]
    leading = np.linalg.svd(states @ plain, full_matrices=False)[2][:rank]
    wanted = plain @ leading.T @ leading
    np.testing.assert_allclose((up @ down).T, wanted, atol=1e-9)
    np.testing.assert_allclose(z + z @ down.T @ up.T + bias, z + (z - z.mean(0)) @ wanted + (y - z).mean(0), atol=1e-8)
    assert np.linalg.matrix_rank(up @ down, tol=1e-9) == min(rank, width)


def test_a_tied_adapter_that_is_fitted_stays_small(model: Path, tmp_path: Path) -> None:
    """A map of [h, h] in a head that was chosen for its few parameters; one that is applied otherwise than it was
    fitted.
    """
    config = fitted_job(model, tmp_path, **{"exits.architecture": "adapter", "exits.adapter_rank": 4})
    convert_by_texts(config, tmp_path / "exits")
    kept = load_file(tmp_path / "exits" / "exit_heads.safetensors")
    shapes = {
        name.removeprefix("exits.2.linear."): tuple(tensor.shape)
        for name, tensor in kept.items()
        if "2.linear." in name
    }
    assert shapes == {"down.weight": (4, 48), "up.weight": (48, 4), "bias": (48,)}
    stage = loaded_with(model, tmp_path / "exits").model
    with torch.no_grad():
        _, inputs = stage.run_layers(stage.embed(torch.tensor([[5, 17, 80, 3]])))
        for layer in (2, 5):
            head = stage.exit_head(layer)
            z, linear = head.own_hidden(inputs[layer]), f"exits.{layer}.linear."
            wanted = z + z @ kept[linear + "down.weight"].T @ kept[linear + "up.weight"].T + kept[linear + "bias"]
            torch.testing.assert_close(head(inputs[layer], lambda hidden, weight: hidden), wanted)
