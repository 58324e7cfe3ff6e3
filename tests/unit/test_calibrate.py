"""Calibration keeps what it promises, on tokens that it has not seen, or says that it can not."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder, confidence
from random_models import random_llama

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.calibration import calibrate_command
from ee_tuning.calibration.calibrate import (
    MEASURES,
    ExitObservations,
    best_measure,
    choose,
    read_exits,
    score_thresholds,
)
from ee_tuning.calibration.calibrate_command import calibrate
from ee_tuning.config import load_config
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.errors import InputError

pytestmark = pytest.mark.slow

MODEL = CHECKOUT / "examples" / "tiny-python-llama"
SAMPLE = 100


def synthetic(seed: int, num_samples: int, skill: tuple[float, ...] = (0.7, 1.0, 1.3)) -> ExitObservations:
    """Exits that are right with probability confidence ** (1 / skill), on samples that are hard or easy as a whole."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.rand(num_samples, generator=generator, dtype=torch.float64).repeat_interleave(SAMPLE)
    known, agrees = {}, {}
    for i, each in enumerate(skill):
        sure = 1 - torch.rand(len(ease), generator=generator, dtype=torch.float64) ** 2 * (1.2 - ease)
        known.update({(2 * i + 2, measure): sure.clamp(0, 1) for measure in MEASURES})
        agrees[2 * i + 2] = torch.rand(len(ease), generator=generator, dtype=torch.float64) < sure.clamp(0, 1) ** (
            1 / each
        )
    return ExitObservations(known, agrees, torch.arange(num_samples).repeat_interleave(SAMPLE), num_layers=8)


@pytest.mark.parametrize("wanted", [0.9, 0.95, 0.98])
def test_tokens_held_out_agree_as_often_as_promised(wanted):
    """Thresholds that fit the noise; an exit judged by tokens that left before it. Of 8 calibrations, none may fail by
    3 deviations.
    """
    for seed in range(8):
        thresholds = choose(synthetic(seed, 200), "margin", wanted)
        seen = score_thresholds(held_out := synthetic(1000 + seed, 1000), "margin", thresholds)
        assert all(threshold is not None for threshold in thresholds.values())
        reached = float(held_out.num_tokens)
        for result in seen.exits.values():
            count = result.share * reached
            assert result.agreement >= wanted - 3 * math.sqrt(wanted * (1 - wanted) / count), (seed, seen)
            reached -= count
        assert seen.agreement >= wanted and seen.mean_depth < 6, "no use if nothing leaves"


def test_an_exit_that_can_not_reach_it_is_not_used():
    """A threshold that seven lucky tokens suggest."""
    readings = synthetic(0, 100, skill=(1.0, 1.0))
    readings.agrees[2] &= torch.rand(readings.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.9
    thresholds = choose(readings, "entropy", 0.97)
    assert thresholds[2] is None and thresholds[4] is not None
    assert score_thresholds(readings, "entropy", thresholds).exits[2].agreement < 0.97
    few = ExitObservations(
        {(2, m): torch.ones(7) for m in MEASURES},
        {2: torch.ones(7, dtype=torch.bool)},
        torch.zeros(7, dtype=torch.int64),
        8,
    )
    assert choose(few, "margin", 0.97) == {2: None}


def test_the_best_measure_is_the_one_that_leaves_earliest():
    """A measure that says nothing, taken for another."""
    readings = synthetic(0, 100)
    for layer in readings.exit_layers:
        for measure in ("max_probability", "entropy"):
            readings.confidences[layer, measure] = torch.rand(
                readings.num_tokens, generator=torch.Generator().manual_seed(layer)
            ).double()
    assert best_measure(readings, 0.95, "best")[0] == "margin"
    assert best_measure(readings, 0.95, "entropy")[0] == "entropy"


@pytest.mark.parametrize("architecture", ["mlp", "layer"])
def test_readings_are_those_of_transformers(tmp_path, architecture):
    """Another exit's confidence, another token's, or another measure's."""
    reference = random_llama(tmp_path / "model", confident=True)
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=architecture)
    plain = PlainDecoder(reference, exits, (2, 4), torch.float64)
    model = loaded_with(tmp_path / "model", exits, dtype="float64").model
    samples = [[(7 * i + j) % 101 for i in range(20)] for j in range(2)]
    readings = read_exits(model, [torch.tensor(sample) for sample in samples])
    told = [plain.logits(sample) for sample in samples]
    for layer in (2, 4):
        for measure in MEASURES:
            wanted = [confidence(row, measure) for each in told for row in each[layer]]
            assert readings.confidences[layer, measure].tolist() == pytest.approx(wanted, abs=1e-5)
        assert readings.agrees[layer].tolist() == [
            bool(x) for each in told for x in each[layer].argmax(-1) == each[6].argmax(-1)
        ]
    assert readings.samples.tolist() == [0] * 20 + [1] * 20


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(exits, calibration.json)"""
    folder = tmp_path_factory.mktemp("calibrated")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    (folder / "text.txt").write_text(Path(json.__file__).read_text() + Path(cli.__file__).read_text())
    code = cli.main(
        (
            f"calibrate --model {MODEL} --exits {exits} --data {folder / 'text.txt'} --agreement 0.8 --measure "
            f"margin --output {folder / 'out' / 'calibration.json'} --set data.cache={folder / 'cache'}"
        ).split()
    )
    assert not code
    return exits, folder / "out" / "calibration.json"


def test_generate_leaves_where_the_calibration_says(calibrated):
    """A file that is read and not used; or used by another measure."""
    exits, path = calibrated
    told = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 10_000 and told["thresholds"]["8"] is not None, told["found"]
    llm = EarlyExitLLM.load(MODEL, exits)
    given = [2.0 if value is None else value for value in told["thresholds"].values()]
    mine = llm.generate(["def main("], calibration=str(path), max_new_tokens=40)[0]
    same = llm.generate(["def main("], threshold=tuple(given), measure="margin", max_new_tokens=40)[0]
    assert (mine.token_ids, mine.exit_layers) == (same.token_ids, same.exit_layers)
    assert set(mine.exit_layers) > {12}
    llm.defaults = dataclasses.replace(llm.defaults, calibration=str(path))
    assert llm.generate(["def main("], max_new_tokens=40)[0].exit_layers == mine.exit_layers
    assert set(llm.generate(["def main("], threshold=1.1, max_new_tokens=40)[0].exit_layers) == {12}, (
        "what is asked for itself counts"
    )


def test_a_calibration_holds_for_the_weights_it_was_made_for(calibrated, tmp_path):
    """Thresholds of heads as they began, used once they are tuned."""
    others = write_exits(MODEL, tmp_path / "others", exit_layers=[4, 8], init="random")
    asked = {"calibration": str(calibrated[1]), "max_new_tokens": 2}
    with pytest.raises(InputError, match="made for other weights of these exits"):
        EarlyExitLLM.load(MODEL, others).generate(["x"], **asked)
    assert EarlyExitLLM.from_config(
        load_config(None, {"model.path": str(MODEL), "exits.path": str(others), "exits.verify": False})
    ).generate(["x"], **asked), "the sums are not looked at where that is asked for"


DAMAGED = [
    ("", "Expecting value"),
    ("[]", "format version 2, got None"),
    ('{"format_version": 9}', "got 9"),
    ('{"format_version": 2, "thresholds": {"4": 2}, "measure": "margin", "num_layers": 12}', "must hold thresholds"),
    (
        '{"format_version": 2, "thresholds": {"4": 0.5}, "measure": "margin", "num_layers": 12}',
        "made for exits 4 of 12",
    ),
    (
        '{"format_version": 2, "thresholds": {"4": 0.5, "8": null}, "measure": "luck", "num_layers": 12}',
        "must hold thresholds",
    ),
]


@pytest.mark.parametrize(("text", "words"), DAMAGED)
def test_a_file_that_makes_no_sense_is_refused(calibrated, tmp_path, text, words, capsys):
    """A traceback, or thresholds of other exits."""
    (tmp_path / "bad.json").write_text(text)
    assert (
        cli.main(
            f"generate --model {MODEL} --exits {calibrated[0]} --calibration {tmp_path / 'bad.json'} --prompt x".split()
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said and "bad.json" in said and "Traceback" not in said and said.count("ee-tuning: error") == 1


def test_calibrate_refuses_what_it_can_not_use(calibrated, tmp_path):
    """Thresholds from a handful of tokens, or from none."""
    (tmp_path / "short.txt").write_text("x = 1\n" * 100)
    base = {"model.path": str(MODEL), "exits.path": str(calibrated[0]), "data.cache": str(tmp_path / "cache")}
    flags = cli.parse(["calibrate"])
    with pytest.raises(InputError, match="needs exits"):
        calibrate(load_config(None, {**base, "exits.path": None}), flags)
    with pytest.raises(InputError, match="needs text"):
        calibrate(load_config(None, base), flags)
    with pytest.raises(InputError, match="at least 4096 tokens, got 512"):
        calibrate(load_config(None, {**base, "data.valid_paths": [str(tmp_path / "short.txt")]}), flags)
    flags.agreement = 1.5
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        calibrate(load_config(None, base), flags)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("sub", "got the folder sub"),
        ("c.png", "the picture beside them is c.png"),
        ("text.txt/c.json", "text.txt is no folder"),
    ],
)
def test_a_place_for_no_file_is_refused_before_anything_is_read(tmp_path, monkeypatch, output, words):
    """The work of an hour ends at its last step, or in a picture that replaces it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("x")
    Path("sub").mkdir()
    flags = cli.parse(["calibrate", "--output", output])
    with pytest.raises(InputError) as error:
        calibrate(load_config(None, {"model.path": "none"}), flags)
    assert words in str(error.value)


def test_the_next_command_can_be_copied(capsys: pytest.CaptureFixture[str]):
    """A file whose name has a blank, of which a shell makes two words."""
    alone = SimpleNamespace(is_logging_rank=True)
    calibrate_command._print_written(Path("my runs/it.json"), Path("my runs/it.png"), alone)  # type: ignore[arg-type]
    assert "ee-tuning generate --calibration 'my runs/it.json' …" in capsys.readouterr().out
