"""`ee-tuning profile` against the hidden states of transformers, and exits placed by it."""

import json
import math
from pathlib import Path

import pytest
import torch

from ee_tuning import cli
from ee_tuning.artifact.exit_heads import read_exit_config

MODEL = Path(__file__).parents[2] / "examples" / "tiny-python-llama"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and beside it the profile of the shipped model on it."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "text.py").write_text("def add(a, b):\n    return a + b\n" * 20)
    return folder


def profile(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert (
        cli.main(
            (
                f"profile --model {MODEL} --text {folder / 'text.py'} --num-exits 3 --json --output "
                f"{folder / 'pictures' / 'profile.png'}"
            ).split()
        )
        == 0
    )
    return json.loads(capsys.readouterr().out)


def test_distances_are_those_between_transformers_hidden_states(told, capsys):
    """A layer's output taken for its input; cosines instead of angles; samples that see each other's tokens."""
    import transformers

    found = profile(told, capsys)
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(MODEL),
        transformers.AutoModelForCausalLM.from_pretrained(MODEL),
    )
    length = 128
    ids = torch.tensor(tokenizer((told / "text.py").read_text())["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)[:8]
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    with torch.no_grad():
        states = [*model(ids, output_hidden_states=True, use_cache=False).hidden_states[:-1], *last]
    assert found["tokens"] == ids.numel() > length and len(found["turns"]) == len(states) - 1
    for i, one in enumerate(states):
        for j, other in enumerate(states):
            wanted = (
                torch.nn.functional.cosine_similarity(one, other, dim=-1).clamp(-1, 1).arccos().mean().item() / math.pi
            )
            assert found["distances"][i][j] == pytest.approx(wanted if i != j else 0, abs=1e-4)
    assert found["turns"] == [found["distances"][i][i + 1] for i in range(len(states) - 1)]
    assert (told / "pictures" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_convert_places_exits_by_the_profile(told, tmp_path, capsys):
    """Exits placed by another text, evenly, or by nothing."""
    wanted = profile(told, capsys)["exit_layers"]
    assert (
        cli.main(
            (
                f"convert --model {MODEL} --exit-layers auto:3:profile --profile-text {told / 'text.py'} "
                f"--architecture norm --exit-output tied --output {tmp_path / 'by_profile'}"
            ).split()
        )
        == 0
    )
    assert (
        cli.main(
            (
                f"convert --model {MODEL} --exit-layers auto:3 --architecture norm,adapter,norm --exit-output tied "
                f"--output {tmp_path / 'evenly'}"
            ).split()
        )
        == 0
    )
    assert list(read_exit_config(tmp_path / "by_profile").exit_layers) == wanted != [3, 6, 9]
    assert read_exit_config(tmp_path / "evenly").exit_layers == (3, 6, 9)


def test_a_job_for_many_processes_is_profiled_in_one_and_many_are_refused(told, tmp_path, capsys, monkeypatch):
    """A 70B model's job that asks for eight GPUs before its exits can be chosen; eight processes that draw one
    picture.
    """
    words = (
        f"profile --model {MODEL} --text {told / 'text.py'} --output {tmp_path / 'profile.png'} {tmp_path / 'job.yaml'}"
    ).split()
    (tmp_path / "job.yaml").write_text(
        "parallel: {tensor_model_parallel_size: 4, pipeline_model_parallel_size: 2, pipeline_layout: [7,5]}"
    )
    assert cli.main(words) == 0
    assert "as auto:3:profile has it" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main(words) == 2 and "profile is for one process, got 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "nowhere.py"], "nowhere.py"),
        (["--num-exits", "0"], "--num-exits"),
        (["--num-exits", "13"], "at most 12"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_what_can_not_be_profiled_is_refused_in_one_line(tmp_path, capsys, arguments, named):
    """A traceback, or a picture of nothing."""
    output = tmp_path / "profile.png"
    assert cli.main(["profile", "--model", str(MODEL), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not output.exists()
