"""What a run leaves to look at: plots, TensorBoard's events, and figures that mean what they say."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuning_jobs import NUM_STEPS, configure, make_tuner

from ee_tuning.config import Config, replace
from ee_tuning.errors import InputError
from ee_tuning.training_log.dashboards import check_dashboards, scalars, weights_and_biases
from ee_tuning.training_log.plots import write_plots


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that compares with the final head."""
    config = configure(model, tmp_path_factory.mktemp("watched") / "run", compare_final=True)
    assert make_tuner(config).run()
    return Path(config.tuning.run_folder)


def test_a_page_of_plots_stands_on_its_own(run: Path) -> None:
    """A page that shows nothing when it is sent to someone, or that lacks what was asked for."""
    write_plots(run, "exits of <a model>")
    page, picture = (run / "plots.html").read_text(), (run / "plots.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert "data:image/png;base64," in page and 'src="http' not in page and "&lt;a model&gt;" in page
    assert all(
        f"<th>{key}" in page for key in ("loss", "perplexity", "confidence", "agreement", "acceptance", "above_0.8")
    )


def test_tensorboard_gets_every_number_of_every_record(run: Path) -> None:
    """Events under another step, or keys that are dropped."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(run / "tensorboard")
    )
    accumulator.Reload()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name, value in scalars(record).items():
            (event,) = [event for event in accumulator.Scalars(name) if event.step == record["step"]]
            assert event.value == pytest.approx(value, rel=1e-5), name
    assert {
        "train/loss/exit 2",
        "validation/agreement/exit 5",
        "validation/speed_up/threshold 0.9",
        "train/idle_share/stage 0",
    } <= set(accumulator.Tags()["scalars"])


def test_figures_keep_within_their_bounds(run: Path) -> None:
    """A share of another total, or a time in another unit."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    for record in records:
        for layer in ("2", "5"):
            assert record["perplexity"][layer] > 1 and 1 / 101 < record["confidence"][layer] < 1
        if record["kind"] == "train":
            assert (
                0 <= record["idle_share"]["0"] < 1 and record["memory_bytes"]["0"] > 2**20 and record["skipped"] == {}
            )
            assert record["flops_per_second"] > record["tokens_per_second"] > 0
        else:
            assert all(
                0 <= record[key][layer] <= 1 for key in ("agreement", "acceptance", "above_0.6") for layer in ("2", "5")
            )
            assert all(0.5 < value < 3.1 for value in record["speed_up"].values())


def test_a_run_without_records_has_no_plots(tmp_path: Path) -> None:
    """A finished run whose records were moved away, or that has none, ends in a traceback when it is started again."""
    write_plots(tmp_path, "a run")
    (tmp_path / "metrics.jsonl").touch()
    write_plots(tmp_path, "a run")
    assert not list(tmp_path.glob("plots*"))


def test_runs_whose_folders_are_called_alike_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs `…/tune` that write into one run of Weights & Biases; one that goes on as another."""
    told: list[dict[str, Any]] = []

    def init(**words: Any) -> SimpleNamespace:
        told.append(words)
        return SimpleNamespace(log=None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # the true one has an account, and a network
    for run in ("a/tune", "b/tune", "a/tune"):
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        with weights_and_biases(
            replace(Config(), tuning={"run_folder": str(tmp_path / run), "wandb_project": "exits"})
        ):
            pass
    first, second, again = (each["id"] for each in told)
    assert first == again != second and {each["name"] for each in told} == {"tune"}
    assert (tmp_path / "a" / "tune" / "wandb_id").read_text().strip() == first


def test_weights_and_biases_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback after the model was loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        check_dashboards(replace(Config(), tuning={"wandb_project": "exits"}))
    check_dashboards(Config())


def test_the_log_begins_with_what_computes(run: Path) -> None:
    """A figure in an old log that nobody can say the version, the kind of layers or the layout of."""
    first = (run / "log.txt").read_text().split("\n")[0]
    assert f"Megatron-core {version('megatron-core')}, local layer spec" in first
    assert f"torch {version('torch')} on cpu · tensor 1 × pipeline 1 × replicas 1" in first
