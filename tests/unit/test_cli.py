"""The command line teaches, answers at once, and says in one line what the user did wrong."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from nursery import Nursery

from ee_tuning import cli
from ee_tuning.commands import Command
from ee_tuning.config import Config
from ee_tuning.errors import InputError

COMMANDS = [command.name for command in cli.COMMANDS]


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> list[tuple[Any, ...]]:
    """Puts a recorder in the place of a command's own function, and returns the calls it receives."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(importlib.import_module(module), function, lambda *args, **keys: calls.append((*args, keys)))
    return calls


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ee-tuning: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_help_imports_nothing_heavy():
    """`--help` that imports torch takes seconds. Modules are counted, for a loaded machine makes time lie."""
    script = (
        "import sys\nfrom ee_tuning.cli import main\n"
        "for words in (['--help'], *([name, '--help'] for name in sys.argv[1:])):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert not end.code\n"
        "    heavy = {'torch', 'megatron', 'transformers', 'numpy', 'safetensors', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ee-tuning") == 1 + len(COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=COMMANDS)
def test_help_teaches_by_an_example_that_parses(command: Command, capsys: pytest.CaptureFixture[str]):
    """An example with a flag that has been renamed is worse than none."""
    with pytest.raises(SystemExit):
        cli.main([command.name, "--help"])
    shown = capsys.readouterr().out
    lines = [line.partition(" < ")[0] for line in command.examples.splitlines() if line.startswith("  ")]
    assert lines
    for line in lines:
        assert line in shown
        words = shlex.split(line)
        assert cli.parse(words[words.index(command.name) :]).command is command


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]):
    """Defaults written into help by hand go stale."""
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"[generation.threshold, default {Config().generation.threshold[0]}]" in shown
    assert "{full,threshold,fixed,speculative}" in shown


def test_flags_and_set_reach_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A flag mapped onto another key than its name says, or one that the file overrules."""
    calls = stand_in(monkeypatch, "ee_tuning.tuning.command", "tune")
    job = tmp_path / "job.yaml"
    job.write_text("model:\n  path: from_file\ntuning:\n  lr: 1\n  seed: 5\n")
    assert (
        cli.main(
            (
                f"tune {job} --data a.txt,b.txt c.txt --exit-layers 3,6 --exit-output tied --lr 1e-3 --output "
                "runs/x --resume --set tuning.adam_beta2=0.5 --lr 2e-3"
            ).split()
        )
        == 0
    )
    config = calls[0][0]
    assert config.model.path == "from_file" and config.data.paths == ("a.txt", "b.txt", "c.txt")
    assert (config.exits.exit_layers, config.exits.output) == ((3, 6), "tied")
    assert (config.tuning.lr, config.tuning.adam_beta2, config.tuning.seed) == (2e-3, 0.5, 5)
    assert config.tuning.run_folder == "runs/x" and config.tuning.resume


def test_two_parses_share_nothing():
    """argparse hands out one default object: a mutated one leaks flags into the next call."""
    assert cli.parse(["tune", "--lr", "1"]).overrides == {"tuning.lr": "1"}
    assert cli.parse(["tune", "--seed", "1"]).overrides == {"tuning.seed": "1"}


def test_generate_takes_prompts_and_stops(monkeypatch: pytest.MonkeyPatch):
    """Stop strings hold commas and spaces, and are not read as YAML."""
    calls = stand_in(monkeypatch, "ee_tuning.generation.command", "generate")
    stops = ["a, b", "[INST]", "null", " "]
    flags = [word for stop in stops for word in ("--stop", stop)]
    assert cli.main(["generate", "--model", "m", "--prompt", "one", "--prompt", "-", *flags, "--json"]) == 0
    config, prompts, keys = calls[0]
    assert prompts == ["one", "-"] and config.generation.stop == tuple(stops)
    assert keys == {
        "prompts_file": None,
        "output": None,
        "overwrite": False,
        "as_json": True,
        "show_exits": False,
        "profile": None,
    }


def test_convert_passes_where_to_write(monkeypatch: pytest.MonkeyPatch):
    """An output that may replace what is there only when asked to."""
    calls = stand_in(monkeypatch, "ee_tuning.artifact.convert", "convert")
    assert cli.main(["convert", "--model", "m", "--exit-layers", "3", "6", "--output", "out"]) == 0
    config, output, keys = calls[0]
    assert (config.exits.exit_layers, output, keys) == ((3, 6), Path("out"), {"overwrite": False})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tun"], "'tun'"),
        (["tune", "--modle", "m"], "did you mean --model?"),
        (["generate", "--prompt", "---"], "begins with a hyphen is written --prompt=…"),
        (["tune", "--mod", "m"], "takes no --mod"),
        (["convert", "--model", "m"], "--output"),
        (["tune"], "--model FOLDER"),
        (["generate", "--model", "m"], "--prompt TEXT"),
        (
            ["generate", "--model", "m", "--prompt", "p", "--threshold", "high"],
            "generation.threshold must be a number, got 'high'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--threshold", "nan"],
            "generation.threshold must be a number, got nan",
        ),
        (["generate", "--model", "m", "--policy", "fast"], "generation.policy must be one of full, threshold, fixed"),
        (["tune", "--model", "m", "--exit-layers", "3,six"], "exits.exit_layers must be a whole number, got 'six'"),
        (["tune", "--model", "m", "--set", "tuning.lr"], "section.key=value"),
        (["tune", "--model", "m", "--set", "tuning.lrr=1"], "did you mean tuning.lr?"),
        (["tune", "no_such.yaml"], "no_such.yaml can not be read"),
    ],
)
def test_what_the_user_did_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    """A traceback for a misspelt flag."""
    assert cli.main(arguments) == 2
    assert named in one_line(capsys)


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def inspect_path(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("ee_tuning.artifact.inspect"), "inspect_path", inspect_path)
    return cli.main(["inspect", "folder"])


def test_an_error_that_every_rank_meets_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Eight ranks that print the same line."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert raising(monkeypatch, InputError("a rule")) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert raising(monkeypatch, InputError("a\nrule")) == 2
    assert one_line(capsys) == "ee-tuning: error: a rule\n"


def inspected(damaged: tuple[int, ...], store: Path) -> int:
    """`ee-tuning inspect` in a world that it joins, where these ranks find something wrong."""

    def inspect_path(*_: Any, **__: Any) -> None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        dist.barrier()
        if dist.get_rank() in damaged:
            raise InputError("damaged")

    with mock.patch("ee_tuning.artifact.inspect.inspect_path", inspect_path):
        return cli.main(["inspect", "folder"])


@pytest.mark.slow
def test_an_error_that_one_rank_meets_is_said_by_that_rank(tmp_path: Path):
    """A damaged file that only the last rank reads, and an exit code 2 that nobody explains."""
    for damaged, codes in (((1,), [0, 2]), ((0, 1), [2, 2])):
        log = tmp_path / f"log_{len(damaged)}"
        ranks = Nursery().start_world(2, inspected, damaged, tmp_path / f"store_{len(damaged)}", log=log)
        try:
            ranks.wait(120)
            assert ranks.codes() == codes
        finally:
            ranks.kill()
        assert log.read_text().count("ee-tuning: error: damaged") == 1


def test_an_interrupt_is_quiet_and_a_bug_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Hiding a bug of ours behind one line would cost its traceback."""
    assert raising(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="ours"):
        raising(monkeypatch, ValueError("ours"))


def test_a_reader_who_leaves_is_no_error():
    """`ee-tuning … | head -1` that ends in a traceback."""
    script = (
        "import sys, types\nfrom ee_tuning import cli\ndef inspect_path(path, as_json, **_):\n    print('x' * 10_000_000)\n"
        "sys.modules['ee_tuning.artifact.inspect'] = fake = types.ModuleType('fake')\nfake.inspect_path = inspect_path\n"
        "sys.exit(cli.main(['inspect', 'folder']))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141
    writer.stderr.close()


def test_python_m_is_the_same_command():
    """torchrun starts `-m ee_tuning`; without a command it shows what there is and fails."""
    done = subprocess.run([sys.executable, "-m", "ee_tuning"], capture_output=True, text=True)
    assert done.returncode == 2
    assert all(name in done.stderr for name in COMMANDS)


def test_a_missing_triton_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback through Megatron-core for a package that its newer releases import and do not declare."""

    def run(argv: object) -> int:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main([]) == 2
    assert "pip install triton" in one_line(capsys)
    monkeypatch.setattr(cli, "_run", lambda argv: importlib.import_module("no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        cli.main([])
