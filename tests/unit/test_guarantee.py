"""A calibration with a guarantee keeps it as often as it says, and says how many documents that takes."""

import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exits import write_exits
from torch import Tensor

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.calibration import calibrate_text
from ee_tuning.calibration.calibrate import MEASURES, ExitObservations, score_thresholds
from ee_tuning.calibration.guarantee import (
    GRID,
    Trials,
    documents_needed,
    earliest,
    hoeffding_bentkus,
    num_rejected,
    prove,
    try_thresholds,
)
from ee_tuning.data.tokens import DocumentSamples
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.json_file import to_json

MODEL = CHECKOUT / "examples" / "tiny-python-llama"


def readings_of(seed: int, num_documents: int, length: int) -> ExitObservations:
    """Two exits whose confidence is half of the truth, on documents that are hard or easy as a whole."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    ease, known, agrees = draw(num_documents).repeat_interleave(length), {}, {}
    for layer in (2, 4):
        sure = draw(len(ease))
        known.update({(layer, measure): sure if measure == "margin" else draw(len(ease)) for measure in MEASURES})
        agrees[layer] = draw(len(ease)) < (sure + ease) / 2
    return ExitObservations(known, agrees, torch.arange(num_documents).repeat_interleave(length), num_layers=8)


def brute_force(total: Fraction, n: int, delta: Fraction) -> float:
    """Of one threshold, by whole numbers where it can be."""
    mean = min(total / n, delta)
    entropy = sum(float(a) * math.log(a / b) for a, b in ((mean, delta), (1 - mean, 1 - delta)) if a)
    tail = sum(math.comb(n, k) * delta**k * (1 - delta) ** (n - k) for k in range(math.ceil(total) + 1))
    return min(1.0, math.exp(-n * entropy), math.e * float(tail))


@pytest.mark.parametrize(
    ("n", "delta"), [(1, Fraction(1, 2)), (7, Fraction(1, 10)), (60, Fraction(1, 20)), (400, Fraction(3, 10))]
)
def test_p_values_are_those_of_the_definition(n, delta):
    """The tail of a binomial that is one too short, a mean above δ, or a sum rounded down."""
    totals = [min(Fraction(n), n * delta * each / 8) for each in range(12)] + [Fraction(n)]
    found = hoeffding_bentkus(torch.tensor([float(total) for total in totals], dtype=torch.float64), n, float(delta))
    assert found.tolist() == pytest.approx([brute_force(total, n, delta) for total in totals], rel=1e-9)


@pytest.mark.parametrize("kind", ["coins", "shares", "two"])
def test_p_values_are_no_smaller_than_chance(kind):
    """Bounds turned round: at an expected loss of exactly δ, a p-value of at most α is seen with probability α at
    most.
    """
    n, delta, count = 150, 0.1, 20_000
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(count, n, generator=generator, dtype=torch.float64)
    losses = {"coins": (draws < delta).double(), "shares": draws**9, "two": 0.5 * (draws < 2 * delta)}[kind]
    p_values = hoeffding_bentkus(losses.sum(1), n, delta)
    for alpha in (0.01, 0.05, 0.2):
        share = float((p_values <= alpha).double().mean())
        assert share <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / count)
        assert kind != "coins" or share > alpha / 6, "coins are what the bounds are near to"


def test_the_first_that_holds_no_longer_ends_the_sequence():
    """A threshold behind one that failed, taken for proven."""
    p_values = torch.tensor([[0.01, 0.05, 0.06, 0.001], [0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert num_rejected(p_values, 0.05).tolist() == [2, 0, 4]


@pytest.mark.parametrize(("delta", "level"), list(product((0.01, 0.05, 0.3, 0.9), (0.05, 0.1 / 3))))
def test_the_number_that_is_said_to_do_does(delta, level):
    """A number that is one too small, or twice what is needed."""
    for loss in (0.0, delta / 2):
        n = documents_needed(delta, level, loss)
        assert n is not None and hoeffding_bentkus(torch.tensor(loss * n, dtype=torch.float64), n, delta) <= level
    least = documents_needed(delta, level)
    assert least == 1 or hoeffding_bentkus(torch.zeros(1, dtype=torch.float64), least - 1, delta) > level
    assert documents_needed(delta, level, delta) is None and documents_needed(1e-12, level) > 10**12


def test_each_threshold_does_what_decoding_would():
    """A token counted at two exits, or at the deeper one; a share of all tokens in place of each document's."""
    readings = readings_of(0, 6, 30)
    trials = try_thresholds(readings, "margin")
    assert list(GRID) == sorted(GRID, reverse=True) and GRID[0] < 1 and GRID[-1] == 0
    for index in (0, 50, 79, 80, 120, 180, 230, 260):
        thresholds: dict[int, float | None] = dict.fromkeys((2, 4), GRID[index])
        outcomes = [
            score_thresholds(readings.only(readings.samples == document), "margin", thresholds) for document in range(6)
        ]
        assert trials.losses[:, index].tolist() == pytest.approx(
            [1 - outcome.agreement for outcome in outcomes], abs=1e-12
        )
        assert trials.depths[:, index].tolist() == pytest.approx([outcome.mean_depth for outcome in outcomes])


@pytest.mark.parametrize("length", [1, 20])
def test_calibrations_break_their_guarantee_no_more_often_than_said(length):
    """A mean loss on the documents at hand, taken for the expected one: that is wrong half of the time."""
    population = readings_of(1, 2000, length)
    trials = {measure: try_thresholds(population, measure) for measure in MEASURES}
    delta, epsilon, count, n = 0.2, 0.1, 200, 120
    generator = torch.Generator().manual_seed(2)
    broken = naive = gained = 0
    for _ in range(count):
        drawn = torch.randint(2000, (n,), generator=generator)
        proofs = prove(
            {measure: Trials(each.losses[drawn], each.depths[drawn]) for measure, each in trials.items()},
            delta,
            epsilon,
        )
        measure = earliest(proofs)
        gained += proofs[measure].num_proven > 0
        truth = trials[measure].losses.mean(0)
        broken += bool(proofs[measure].num_proven) and float(truth[proofs[measure].num_proven - 1]) > delta
        naive += float(truth[int((proofs[measure].losses <= delta).sum()) - 1]) > delta
    allowed = epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / count)
    assert broken / count <= allowed < naive / count and gained > count / 2


def test_documents_are_the_samples():
    """The end of one document read as the next one's, a document cut in two, a prompt without an answer counted."""
    stream, starts = np.arange(20, dtype=np.uint16), np.array([0, 1, 5, 15])
    samples = DocumentSamples(stream, starts, seq_length=4)
    assert [samples.sample(index).tokens.tolist() for index in range(3)] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [15, 16, 17, 18, 19],
    ]
    assert len(samples) == 3 and samples.num_windows == 4
    counts = np.zeros(20, np.uint8)
    counts[[4, 5, 14, 19]] = 1
    told = DocumentSamples(stream, starts, 4, counts)
    assert [told.sample(index).loss_mask.tolist() for index in range(2)] == [[0, 0, 1], [0, 0, 0, 1]] and len(told) == 2


def test_tokens_that_count_alone_are_judged(monkeypatch):
    """The user's words of a chat, which no exit ever says; documents drawn twice."""
    counts = np.array([0, 0, 1, 0, 0, 1, 1, 0, 1], np.uint8)
    samples = DocumentSamples(np.arange(9, dtype=np.uint16), np.array([0, 4, 7]), 8, counts)
    monkeypatch.setattr(
        calibrate_text,
        "read_exits",
        lambda _, given: ExitObservations(
            {(2, "margin"): torch.cat(list(given)).double()},
            {2: torch.ones(6, dtype=torch.bool)},
            torch.arange(3).repeat_interleave(torch.tensor([len(tokens) for tokens in given])),
            8,
        ),
    )
    drawn = list(calibrate_text.draw(samples, range(3)))
    alone = SimpleNamespace(topology=SimpleNamespace(dp=1, dp_rank=0, world_size=1))
    readings = calibrate_text.read_drawn(alone, drawn)
    assert sorted(readings.confidences[2, "margin"].tolist()) == [1, 4, 5, 7]
    assert readings.samples.bincount().sort()[0].tolist() == [1, 1, 2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(exits, documents)"""
    folder = tmp_path_factory.mktemp("guaranteed")
    text = Path(json.__file__).read_text(encoding="utf-8")
    (folder / "text.jsonl").write_text(
        "".join(to_json({"text": text[30 * i : 30 * i + 30]}) + "\n" for i in range(100)), encoding="utf-8"
    )
    return write_exits(MODEL, folder / "heads", exit_layers=[8], init="copy"), folder / "text.jsonl"


def run(shared: tuple[Path, Path], output: Path, *flags: str) -> int:
    return cli.main(
        [*f"calibrate --model {MODEL} --exits {shared[0]} --data {shared[1]} --output {output}".split(), *flags]
    )


@pytest.mark.slow
def test_generate_takes_the_thresholds_that_were_proven(shared, tmp_path, capsys):
    """A file that says less than its tests, or that decoding does not take."""
    output = tmp_path / "calibration.json"
    assert run(shared, output, "--guarantee", "0.4", "--confidence", "0.9") == 0
    told, said = json.loads(output.read_text()), capsys.readouterr().out
    guarantee = told["guarantee"]
    assert (guarantee["delta"], guarantee["epsilon"], guarantee["documents"]) == (0.4, 0.1, 100) and guarantee[
        "level"
    ] == round(0.1 / 3, 8)
    test = guarantee["tests"][told["measure"]]
    index = test["num_proven"] - 1
    assert index >= 0 and told["thresholds"] == {"8": guarantee["grid"][index]} and guarantee["grid"] == list(GRID)
    assert max(test["p_values"][: index + 1]) <= guarantee["level"] < test["p_values"][index + 1]
    found = hoeffding_bentkus(torch.tensor(test["losses"], dtype=torch.float64) * 100, 100, 0.4)
    assert found.tolist() == pytest.approx(test["p_values"], abs=1e-6)
    assert (
        test["mean_depths"][index] < 11
        and "guaranteed: of documents like these, at most 40.00% of the tokens differ" in said
    )
    assert output.with_suffix(".png").stat().st_size > 10_000
    llm = EarlyExitLLM.load(MODEL, shared[0])
    mine, same = (
        llm.generate(["def main("], max_new_tokens=30, **asked)[0]
        for asked in (
            {"calibration": str(output)},
            {"threshold": (told["thresholds"]["8"],), "measure": told["measure"]},
        )
    )
    assert (mine.token_ids, mine.exit_layers) == (same.token_ids, same.exit_layers) and set(mine.exit_layers) == {8, 12}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guarantee", "1"], "--guarantee must lie between 0 and 1, got 1; 0.05"),
        (["--guarantee", "nan"], "--guarantee must lie between 0 and 1, got nan"),
        (["--guarantee", "0.1", "--confidence", "0"], "--confidence must lie between 0 and 1, got 0; 0.95"),
        (["--confidence", "0.9"], "--confidence 0.9 is of --guarantee, and none is given"),
        (["--agreement", "0.9", "--guarantee", "0.1"], "--agreement 0.9 and --guarantee 0.1"),
        (
            ["--guarantee", "0.03"],
            "needs at least 135 documents, even where no exit is ever wrong, got 100; give more --data (a text file is "
            "one document, each line of a .jsonl file another); with only one --measure, 99 would do",
        ),
        (
            ["--guarantee", "0.05", "--tokens", "1000"],
            "needs at least 80 documents, even where no exit is ever wrong, got 34; raise --tokens",
        ),
    ],
)
def test_what_can_not_be_guaranteed_is_refused(shared, tmp_path, capsys, flags, words):
    """A guarantee that no number of right tokens could give, without a word; a file of it."""
    output = tmp_path / "calibration.json"
    assert run(shared, output, *flags) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("ee-tuning: error") == 1 and "Traceback" not in said and not output.exists()


@pytest.mark.slow
def test_none_that_can_be_proven_is_said(shared, tmp_path, capsys, monkeypatch):
    """Thresholds that were not proven, written all the same."""
    trials = Trials(torch.full((100, len(GRID)), 0.5, dtype=torch.float64), torch.full((100, len(GRID)), 8.0))
    output = tmp_path / "none.json"
    assert prove({"margin": trials}, 0.3, 0.05)["margin"].threshold is None
    monkeypatch.setattr("ee_tuning.calibration.guarantee_command.try_thresholds", lambda *_: trials)
    assert run(shared, output, "--guarantee", "0.3", "--measure", "margin") == 0
    said = capsys.readouterr().out
    assert (
        "no threshold can be guaranteed: no token will leave early" in said
        and "tune the heads longer, or raise --guarantee" in said
    )
    assert json.loads(output.read_text())["thresholds"] == {"8": None}
