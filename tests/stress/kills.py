"""`kill -9` at random moments: of commands that save, and of a tuning run on 2 × 2 processes."""

import contextlib
import functools
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nursery import Life, Nursery, inode
from outcomes import Content, same_bytes
from random_models import random_llama
from safetensors_stress import read_artifact, read_model
from tuning_jobs import NUM_STEPS, checkpoint, configure, make_tuner, records

from ee_tuning import cli
from ee_tuning import config as job
from ee_tuning.artifact.exit_config import read_exit_config
from ee_tuning.checkpoint.megatron import DistributedCheckpoint
from ee_tuning.checkpoint.verify import verify_folder
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.training_log.metrics import METRICS

_LONGEST = 120.0  # seconds that a job of these may take on a busy machine


@dataclass
class Deaths:
    """What was found after each, and what went wrong."""

    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Markdown: a row per job, a column per finding."""
        findings = sorted({finding for _, finding in self.found})
        rows = ["| killed | " + " | ".join(findings) + " |", "|---|" + "---|" * len(findings)]
        for what in dict.fromkeys(what for what, _ in self.found):
            rows.append(f"| {what} | " + " | ".join(str(self.found[what, finding]) for finding in findings) + " |")
        return "\n".join(rows)


@dataclass(frozen=True)
class _Save:
    """A command that writes a folder, which holds something else for each seed, and what reads it."""

    arguments: Callable[[int], list[str]]
    """Of a seed."""
    read: Callable[[Path], Content]


def stress_saves(count: int, seed: int, scratch: Path, nursery: Nursery) -> Deaths:
    """Kills `count` saves, half of them over an earlier output, and looks what is there; then runs each again to its
    end.
    """
    deaths, former, wanted, durations = Deaths(), {}, {}, {}
    saves = _saves(scratch)
    for name, save in saves.items():
        former[name], wanted[name] = scratch / "former" / name, scratch / "wanted" / name
        _run(nursery, save.arguments(1), former[name], scratch)
        durations[name] = _run(nursery, save.arguments(2), wanted[name], scratch)
        assert not _is_same(save.read(former[name]), save.read(wanted[name])), (
            f"{name}: nobody could tell the former from the new"
        )
    for index in range(count):
        name = list(saves)[index % len(saves)]
        draw = random.Random(f"{seed} save {index}")
        folder = scratch / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        output = folder / "output"
        is_replaced = draw.random() < 0.5
        if is_replaced:
            shutil.copytree(former[name], output)
        arguments = [*saves[name].arguments(2), "--overwrite", "--output", str(output)]
        try:
            life = nursery.start(command, arguments, log=scratch / "log")
            life.wait(draw.uniform(0, 1.1 * durations[name]))
            life.kill(with_children=draw.random() < 0.7)
            is_partial = any(".partial-" in path.name for path in folder.iterdir())
            finding = _found(saves[name], folder, output, former[name] if is_replaced else None, wanted[name])
            _run(nursery, [*saves[name].arguments(2), "--overwrite"], output, scratch)
            _check_same(saves[name].read(output), saves[name].read(wanted[name]))
            _verify(output)
            assert [path.name for path in folder.iterdir()] == ["output"], (
                f"left behind: {sorted(path.name for path in folder.iterdir())}"
            )
            deaths.found[name, finding] += 1
            deaths.found[name, "of these, killed while it wrote"] += is_partial
        except (AssertionError, InputError, OSError) as error:
            deaths.failures.append(f"save {index} of seed {seed}, {name}: {error!r}")
    return deaths


def _saves(scratch: Path) -> dict[str, _Save]:
    model = scratch / "model"
    random_llama(
        model,
        hidden_size=128,
        intermediate_size=512,
        vocab_size=4001,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )

    def converted(seed: int) -> list[str]:
        return ["convert", "--model", str(model), "--init", "random", "--seed", str(seed), "--exit-layers", "2,4"]

    def exported(kind: str, seed: int, *more: str) -> list[str]:
        return ["export", "--format", kind, "--model", str(model), "--exits", str(scratch / f"exits{seed}"), *more]

    for seed in (1, 2):
        assert cli.main([*converted(seed), "--output", str(scratch / f"exits{seed}")]) == 0
    return {
        "convert": _Save(converted, read_artifact),
        "export --format artifact": _Save(lambda seed: exported("artifact", seed, "--add", "5"), read_artifact),
        "export --format hf": _Save(functools.partial(exported, "hf"), _read_early_model),
        "export --format megatron": _Save(functools.partial(exported, "megatron"), _read_early_checkpoint),
    }


def _read_early_model(folder: Path) -> Content:
    """A merged Hugging Face folder: the backbone, the exits and what config.json tells of them."""
    model = read_model(folder)
    with SafetensorsFolder(folder, "exit_heads") as exits:
        tensors = {name: exits.full(name) for name in exits.names()}
    told = json.loads((folder / "config.json").read_text())["early_exit"]
    return Content({**model.tensors, **tensors}, (model.identity, told))


def _read_early_checkpoint(folder: Path) -> Content:
    """A distributed checkpoint: the backbone, and the exits beside it."""
    model, checkpoint = read_model(folder), DistributedCheckpoint(folder)
    tensors = {
        key: checkpoint.rectangle(key, (0,) * len(shape), shape, is_checked=True)
        for key, shape in checkpoint.shapes.items()
        if key.startswith("exits.")
    }
    return Content({**model.tensors, **tensors}, (model.identity, read_exit_config(folder)))


def command(arguments: list[str]) -> int:
    """In a process of its own: one line of the command line."""
    return cli.main(arguments)


def _run(nursery: Nursery, arguments: list[str], output: Path, scratch: Path) -> float:
    output.parent.mkdir(parents=True, exist_ok=True)
    log = scratch / "log"
    log.unlink(missing_ok=True)
    life = nursery.start(command, [*arguments, "--output", str(output)], log=log)
    seconds = life.wait(_LONGEST)
    assert life.codes() == [0], f"{arguments[0]} ended with {life.codes()}: {log.read_text()[-2000:]}"
    return seconds


def _found(save: _Save, folder: Path, output: Path, former: Path | None, wanted: Path) -> str:
    """What stands where the output belongs. Raises AssertionError where that, or something beside it, is half of
    anything.
    """
    new = save.read(wanted)
    for partial in folder.iterdir():
        if partial not in (output, output.with_name(f".{output.name}.owner")):  # whose lock has ended with its process
            assert partial.name.startswith("output.partial-"), partial.name
            try:
                content = save.read(partial)
            except InputError:
                continue
            # Killed just before it was given its name, or after another had it: whole all the same.
            assert any(_is_same(content, save.read(whole)) for whole in (wanted, former) if whole), (
                "half of a save loads"
            )
    if not output.exists():
        assert former is None, "the former output is gone"
        return "nothing there"
    _verify(output)
    content = save.read(output)
    if former is not None and _is_same(content, save.read(former)):
        return "the former output, whole"
    _check_same(content, new)
    return "the new output, whole"


def _verify(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        verify_folder(folder)


def _is_same(a: Content, b: Content) -> bool:
    return (
        a.identity == b.identity
        and a.tensors.keys() == b.tensors.keys()
        and all(same_bytes(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


def _check_same(got: Content, wanted: Content) -> None:
    assert _is_same(got, wanted), "it loads, and is not what was to be written"


def stress_tuning(count: int, seed: int, scratch: Path, nursery: Nursery) -> Deaths:
    """Kills a run on TP 2 × PP 2 `count` times, some again while they resume; each goes on to the bits of the run never
    stopped.
    """
    deaths = Deaths()
    model = scratch / "model"
    random_llama(model)
    whole = configure(model, scratch / "whole", tp=2, pp=2, dtype="float32", save_interval=1, keep_checkpoints=2)
    coming_up, duration = _tuned(nursery, whole, scratch)
    wanted = _result(whole)
    killed = 0
    while killed < count:
        draw = random.Random(f"{seed} tuning {killed}")
        config = configure(model, scratch / "killed", tp=2, pp=2, dtype="float32", save_interval=1, keep_checkpoints=2)
        shutil.rmtree(scratch / "killed", ignore_errors=True)
        steps: list[int] = []
        first, num_kills = killed, min(draw.choice((1, 2, 4, 8)), count - killed)
        killed += num_kills
        try:
            for _ in range(num_kills):
                metrics = scratch / "killed" / METRICS
                earlier = inode(metrics)
                life = _started(nursery, config, scratch)
                if draw.random() < 0.75:  # the rest die while they come up
                    life.wait_for(metrics, other_than=earlier)  # a run begins by replacing it
                    life.wait(draw.uniform(0, duration))
                else:
                    life.wait(draw.uniform(0, coming_up))
                # What the ranks have started has to end by itself.
                life.kill(first=draw.randrange(4), pause=draw.choice((0, 0, 0.05, 0.5)), with_children=False)
                steps.append(_last_step(config))
            _tuned(nursery, config, scratch)
            _check_result(_result(config), wanted)
            _verify(scratch / "killed")
            litter = [path.name for path in scratch.glob("killed/**/*.partial-*")]
            assert not litter, f"left behind: {litter}"
            for step in steps:
                deaths.found["tune, TP 2 × PP 2", f"resumed from step {step}, equal to the bit"] += 1
        except (AssertionError, InputError, OSError) as error:
            deaths.failures.append(f"tuning {first} of seed {seed}, killed at steps {steps}: {error!r}")
    return deaths


def tune_to_the_end(config: Config) -> None:
    """Of each of four processes: a run, from where it was left, to its artifact."""
    tuner = make_tuner(config)
    tuner.resume()
    assert tuner.run()
    tuner.save_exit_heads(tuner.run_folder / "exit_heads")


def _started(nursery: Nursery, config: Config, scratch: Path) -> Life:
    return nursery.start_world(4, tune_to_the_end, job.replace(config, tuning={"resume": True}), log=scratch / "log")


def _tuned(nursery: Nursery, config: Config, scratch: Path) -> tuple[float, float]:
    """How long it took to come up, and then to the end."""
    (scratch / "log").unlink(missing_ok=True)
    life = _started(nursery, config, scratch)
    coming_up = life.wait_for(Path(config.tuning.run_folder) / METRICS)  # of a run that goes on, not asked
    seconds = life.wait(_LONGEST)
    if life.codes() != [0] * 4:
        life.kill()
        raise AssertionError(f"the run ended with {life.codes()}: {(scratch / 'log').read_text()[-2000:]}")
    life.check_gone()
    return coming_up, seconds - coming_up


def _last_step(config: Config) -> int:
    latest = Path(config.tuning.run_folder) / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def _result(config: Config) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], Content]:
    return checkpoint(config, NUM_STEPS), records(config), read_artifact(Path(config.tuning.run_folder) / "exit_heads")


def _check_result(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert got[0].keys() == wanted[0].keys(), "other tensors in the checkpoint"
    assert all(torch.equal(tensor, wanted[0][name]) for name, tensor in got[0].items()), "other masters or moments"
    assert got[1] == wanted[1], "other records"
    _check_same(got[2], wanted[2])
