"""`--profile`: seconds by part, of the part alone, and a trace of all ranks."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from exits import write_exits
from served import MODEL
from torch import nn

from ee_tuning.cli import main
from ee_tuning.errors import InputError
from ee_tuning.parallel import time_parts
from ee_tuning.parallel.time_parts import REST, count_step, measured_parts, part
from ee_tuning.parallel.time_report import check_profile_folder, report_lines


@part("outer")
def outer(seconds: float) -> float:
    time.sleep(seconds)
    inner(seconds)
    inner(seconds)
    return seconds


@part("inner")
def inner(seconds: float) -> None:
    time.sleep(seconds)


def test_the_time_of_a_part_is_its_own():
    """A part that counts what is within it twice, so that shares add up to more than everything."""
    began = time.perf_counter()
    with measured_parts({}) as parts:
        for _ in range(3):
            assert outer(0.01) == 0.01
            count_step()
        other = threading.Thread(target=outer, args=(0.01,))  # a saver's thread is beside the run, not in it
        other.start()
        other.join()
    assert parts.steps == 3 and parts.calls == {"outer": 3, "inner": 6}
    assert sum(parts.seconds.values()) == pytest.approx(time.perf_counter() - began, rel=0.2)
    assert 0.03 <= parts.seconds["outer"] < parts.seconds["inner"] and parts.seconds["inner"] >= 0.06
    assert parts.seconds[REST] >= 0.03
    assert [name for name, _, _ in parts.events] == ["inner", "inner", "outer"], "the third step alone is traced"
    assert all(began < ended for _, began, ended in parts.events)


def test_modules_and_collectives_are_as_before():
    """A module that stays wrapped, and so holds its measurement for ever; a patch of torch that outlives its use."""
    module, reduce = nn.Identity(), dist.all_reduce
    with pytest.raises(ZeroDivisionError), measured_parts({"attention": [module]}) as parts:
        module(1)
        assert dist.all_reduce is not reduce
        raise ZeroDivisionError
    assert parts.calls == {"attention": 1} and "forward" not in vars(module) and dist.all_reduce is reduce
    assert time_parts._measured is None


def test_the_table_has_each_stage_and_all_of_the_time():
    """Stages whose parts are put under another's head."""
    with measured_parts({}) as first:
        inner(0.001)
        count_step()
    with measured_parts({}) as last:
        outer(0.001)
        count_step()
    lines = report_lines([first, last])
    assert lines[0] == "time by part over 1 steps" and lines[1].split("  ")[0] == "part"
    assert [line.split("  ")[0] for line in lines[-2:]] == [REST, "all of it"]
    assert {line.split("  ")[0] for line in lines[2:-2]} == {"inner", "outer"}


def test_generate_and_tune_write_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A flag whose report lacks the kernels, or that writes over another's folder."""
    exits, text, folder = write_exits(MODEL, tmp_path / "heads", exit_layers=[4]), tmp_path / "x.jsonl", tmp_path / "p"
    text.write_text("".join(json.dumps({"text": f"def f{i}(): return {i}\n" * 9}) + "\n" for i in range(40)))
    given = ["--model", str(MODEL), "--exits", str(exits)]
    assert main(["generate", *given, "--prompt", "def", "--max-new-tokens", "9", "--profile", f"{folder}/g"]) == 0
    (rank,) = json.loads((folder / "g/parts.json").read_text())
    assert rank["steps"] == 9 and sum(rank["calls"].values()) >= 9
    trace = json.loads((folder / "g/trace.json").read_text())["traceEvents"]
    assert trace[0]["args"]["name"] == "rank 0, stage 0" and {each["ph"] for each in trace[1:]} == {"X"}
    sizes = ["--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "3"]
    tuned = ["tune", *given, "--data", str(text), "--output", str(tmp_path / "run"), *sizes]
    assert main([*tuned, "--profile", f"{folder}/t"]) == 0
    (rank,) = json.loads((folder / "t/parts.json").read_text())
    assert rank["steps"] == 3 and rank["calls"]["optimizer"] == 3 and rank["calls"]["exit heads, backward"] == 3
    assert rank["calls"]["attention"] % 4 == 0 and rank["calls"]["MLP"] == rank["calls"]["attention"]
    capsys.readouterr()
    assert main([*tuned, "--profile", f"{folder}/t"]) == 2
    assert "--profile must name a new or empty folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="can not: Not a directory"):
        check_profile_folder(text / "below")
