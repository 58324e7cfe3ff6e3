"""A model whose activations overflow: what is made of NaN looks like a result, and every command that would make it
stops.
"""

from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import cli


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `exits` and `text`; the model overflows in its second layer."""
    folder = tmp_path_factory.mktemp("overflowing")
    model = random_llama(folder / "model", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    model.save_pretrained(folder / "model")
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits", architecture="norm", init="copy")
    (folder / "text").write_text("hello world, how are you? " * 200)
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["calibrate", "--exits", "exits", "--data", "text", "--output", "out.json"],
            "hidden states behind layer 6 are no numbers",
        ),
        (["profile", "--text", "text", "--output", "out.png"], "hidden states behind layer 2 are no numbers"),
        (
            [
                "tune",
                "--exits",
                "exits",
                "--data",
                "text",
                "--output",
                "out",
                "--train-iters",
                "2",
                "--seq-length",
                "16",
                "--global-batch-size",
                "4",
                "--set",
                "tuning.eval_iters=0",
            ],
            "not one step updated exit 2, 4",
        ),
    ],
)
def test_a_command_stops_at_nan(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    """A traceback from a picture, layers chosen by NaN, an artifact that holds what the run began with: and exit code
    0.
    """
    monkeypatch.chdir(job)
    monkeypatch.setenv("EE_TUNING_CACHE", str(job / "cache"))
    assert cli.main([*command, "--model", "model"]) == 2
    assert words in capsys.readouterr().err
    assert not list(job.glob("out.*")) and not (job / "out" / "exit_heads").exists()
