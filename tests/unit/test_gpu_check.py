"""What is run on a GPU at hand for minutes is rehearsed here on tiny shapes, so that only CUDA itself can surprise."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))

import gpu_check  # noqa: E402
from gpu_stages import decoding, layers, right, tuning  # noqa: E402
from gpu_stages.bench import Bench, in_own_world  # noqa: E402
from gpu_stages.checks import Check, Finding, Outcome, at_least, at_most, run_checks  # noqa: E402
from gpu_stages.profile import of_spans  # noqa: E402
from gpu_stages.ranks import run_ranks  # noqa: E402
from gpu_stages.report import LONGEST_TABLE, Report, facts_of  # noqa: E402

from ee_tuning.config import ParallelSection  # noqa: E402
from ee_tuning.parallel.topology import destroy_parallel, init_parallel  # noqa: E402

pytestmark = pytest.mark.slow

STAGES = {1: right, 2: decoding, 3: tuning, 5: layers}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(
        "cpu", tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("results"), is_tiny=True, is_inline=True
    )
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_world() -> Iterator[None]:
    if dist.is_initialized():  # of another test
        destroy_parallel()
    yield


@pytest.mark.parametrize(
    ("stage", "name"), [(number, check.name) for number, stage in STAGES.items() for check in stage.CHECKS]
)
def test_every_check_runs(bench: Bench, stage: int, name: str) -> None:
    """Minutes with a GPU that end in a misspelt name."""
    (check,) = (each for each in STAGES[stage].CHECKS if each.name == name)
    findings = list(check.run(bench))
    assert findings and not [each for each in findings if each.is_must and each.is_met is False]
    assert all(isinstance(each.value, str) or each.value == each.value for each in findings)


def check(*findings: Finding, fails: bool = False, seconds: float = 1.0) -> Check:
    def run(bench: Bench) -> Iterator[Finding]:
        yield from findings
        if fails:
            raise ValueError("as it must")

    return Check("a check", seconds, run)


def outcomes_of(bench: Bench, *checks: Check, left: Callable[[], float] = lambda: 100.0) -> list[Outcome]:
    outcomes: list[Outcome] = []
    run_checks({7: checks}, bench, outcomes, seconds_left=left, changed=lambda: None)
    return outcomes


def test_a_failure_keeps_its_traceback_and_what_was_found_before_it(bench: Bench) -> None:
    """One surprise that ends all that the time would have sufficed for."""
    found = at_least("speed", 3.0, 5.0)
    first, second, third = outcomes_of(
        bench, check(found, fails=True), check(at_most("error", 2.0, 1.0, is_must=True)), check(found)
    )
    assert (first.state, first.findings) == ("failed", [found]) and "ValueError: as it must" in first.error
    assert second.state == "failed" and third.state == "passed", "a goal of speed that is missed is no failure"
    assert "not met: speed" in third.line and "as it must" in first.line


def test_a_check_for_which_there_is_no_time_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is begun with ten seconds left, and takes what a shorter one behind it needed."""
    monkeypatch.setattr(bench, "is_tiny", False)
    long, short = outcomes_of(bench, check(seconds=200.0), check(seconds=20.0))
    assert (long.state, short.state) == ("no time", "passed") and "100 s are left" in long.line


def test_the_record_is_whole_at_every_moment_and_the_table_short(bench: Bench, tmp_path: Path) -> None:
    """A record half written when the machine goes, and a table whose head is cut off."""
    report, states = Report(tmp_path / "out.json", facts_of(torch.device("cpu"), [7], True)), list[list[str]]()

    def changed() -> None:
        report.write()
        states.append([each["state"] for each in json.loads((tmp_path / "out.json").read_text())["checks"]])

    many = check(*[Finding(what=f"figure {i}", value=float("nan")) for i in range(200)], at_least("the goal", 1.0, 2.0))
    run_checks({7: [many, check(fails=True)]}, bench, report.outcomes, seconds_left=lambda: 0.0, changed=changed)
    assert states[0] == ["running"] and states[-1] == ["passed", "failed"]
    assert len(report.table().split("\n")) <= LONGEST_TABLE and "the goal" in report.table() and report.has_failed
    assert json.loads((tmp_path / "out.json").read_text())["device"] == "CPU"


HANGS = """
import sys, time
sys.path.insert(0, {tools!r})
from gpu_stages.deadline import MARGIN, Deadline
def hangs():
    time.sleep(60)
deadline = Deadline(MARGIN + 0.3, print)
hangs()
"""


def test_what_hangs_ends_with_the_budget() -> None:
    """A deadlock that takes the whole time, and the figures before it with it."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(tools=str(TOOLS))], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 3 and time.monotonic() - began < 50 and "in hangs" in done.stdout, done


def test_a_check_that_is_cut_off_keeps_what_it_found(tmp_path: Path) -> None:
    """A record in which the check that hung is still running, and nobody knows where."""
    report = Report(tmp_path / "out.json", facts_of(torch.device("cpu"), [7], True))
    report.outcomes.append(Outcome(7, "hangs", findings=[Finding(what="the last word", value=1.0)]))
    report.cut_off("in hangs\n")
    assert report.has_failed and "the last word" in report.table() and "its time was over" in report.table()
    assert (report.outcomes[0].state, report.outcomes[0].error) == ("cut off", "in hangs\nits time was over, here")


def test_who_was_asked_before_leaves_no_world_behind() -> None:
    """A plan that is refused because the process it is asked of has tuned: stage 3 after stage 1, all of it."""
    for function in (joined_world, joined_world):
        assert not in_own_world(function)


def joined_world() -> bool:
    was_there = dist.is_initialized()
    init_parallel(ParallelSection())
    return was_there


def test_gaps_and_kernels_are_told_from_spans() -> None:
    """Kernels side by side counted twice, or a gap between two of which a third one covers it."""
    found = of_spans([(0, 4, "one"), (2, 6, "two"), (10, 12, "one"), (11, 11.5, "two")], num_steps=2)
    assert found["idle_share"] == pytest.approx(4 / 12) and found["kernels_per_step"] == 2
    assert found["gaps"] == [{"microseconds": 4, "after": "two", "before": "one"}]
    assert found["kernels"][0] == {"name": "one", "share": 6 / 12, "microseconds_per_step": 3.0, "calls_per_step": 1.0}


def test_ranks_tell_what_they_found_or_why_not(tmp_path: Path) -> None:
    """A rank that fails unheard, and another one waited for until the time is over."""
    for name in ("found", "failed"):
        (tmp_path / name).mkdir()
    assert run_ranks(os.getenv, ("RANK",), tmp_path / "found", size=2, seconds=100, environment={}) == ["0", "1"]
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*Expecting value.*rank 1: "):
        run_ranks(json.loads, ("x",), tmp_path / "failed", size=2, seconds=100, environment={})


def test_a_gpu_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of torch's, after the imports of all stages."""
    assert gpu_check.main(["1", "--json", "unused.json", "--budget", "10", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
