"""A rank that waits long says for whom, and one that gave up does, too; layouts leave no process groups behind."""

import io
import platform
import time
from contextlib import redirect_stderr
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from world import World

from ee_tuning import cli
from ee_tuning.config import ParallelSection
from ee_tuning.errors import InputError
from ee_tuning.parallel import watchdog
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.parallel.watchdog import hang_watchdog

SHAPE = (3, 2, 4)
PLACE: Any = SimpleNamespace(rank=5, stage=2, tp_rank=1, dp_rank=0)


class Marked(io.StringIO):
    """What is said, and a file once there is something."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self._mark = mark

    def write(self, text: str) -> int:
        done = super().write(text)
        self._mark.touch()
        return done


def slow_first_stage(folder: Path) -> tuple[str, timedelta]:
    """What a rank says while the first stage takes its time, until all others have said something; when its relay's
    group gives up.
    """
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=4, distributed_timeout_minutes=7))
    with (
        mock.patch.object(watchdog, "REPORT_AFTER_SECONDS", 0.2),
        redirect_stderr(Marked(folder / str(topology.rank))) as said,
    ):
        relay, hidden = Relay(topology, SHAPE, torch.float32), torch.zeros(SHAPE)
        ends = time.monotonic() + 60
        while topology.is_first_stage and len(list(folder.iterdir())) < 3 and time.monotonic() < ends:
            time.sleep(0.01)
        if not topology.is_first_stage:
            hidden, _ = relay.receive()
        if not topology.is_last_stage:
            relay.send(hidden, next_action=NextAction.END)
        relay.finish()
    return said.getvalue(), topology.pp_control._get_backend(torch.device("cpu")).options._timeout


def test_a_rank_says_for_whom_it_waits(world: World, tmp_path: Path) -> None:
    """A hang of which nobody can tell which rank began it; a time-out that is asked for and not set."""
    said, timeouts = zip(*world.run(slow_first_stage, tmp_path), strict=True)
    for rank in (1, 2, 3):
        assert f"rank {rank} (stage {rank}, tensor 0, replica 0) has waited" in said[rank], said[rank]
        assert f"for micro-batch 1 from stage {rank - 1} (rank {rank - 1})\n" in said[rank]
    assert "micro-batch 1 from" not in said[0]
    assert set(timeouts) == {timedelta(minutes=7)}


def test_a_wait_is_told_ever_less_often() -> None:
    """A line a second of a hang fills the log of a night."""
    with hang_watchdog(PLACE, "a word"):
        now = time.monotonic()
        told = [seconds for seconds in range(1000) if watchdog._due_reports(now + seconds)]
    assert told[0] in (60, 61) and [round(later / earlier) for earlier, later in pairwise(told)] == [2, 2, 2, 2]
    assert not watchdog._due_reports(now + 10_000), "it is over"


def test_a_wait_in_vain_names_what_was_waited_for() -> None:
    """gloo's own words, which name a line of its source."""
    told = r"^rank 5 \(stage 2, tensor 1, replica 0\) waited 0 s for micro-batch 3, in vain: .*Timed out"
    with pytest.raises(RuntimeError, match=told), hang_watchdog(PLACE, "micro-batch 3"):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv\nmore")
    with pytest.raises(RuntimeError, match=r"^shapes differ"), hang_watchdog(PLACE, "the layers"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_out_that_makes_no_sense_is_refused(minutes: float) -> None:
    """Every wait would end at once, or nothing would ever end; a traceback of datetime's."""
    with pytest.raises(InputError, match=r"distributed_timeout_minutes must lie between 0\.01 and 10080"):
        init_parallel(ParallelSection(distributed_timeout_minutes=minutes))


def groups_after_layouts() -> list[int]:
    """Process groups after each of three rounds of layouts."""
    counts = []
    for _ in range(3):
        for tp, pp in ((1, 4), (2, 2), (4, 1), (1, 1)):
            init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def test_layouts_leave_no_groups_behind(world: World) -> None:
    """A group kept for every layout: threads that wake a hundred times a second, hundreds of them in the end."""
    for counts in world.run(groups_after_layouts):
        assert counts[0] == counts[1] == counts[2] <= 20, counts


GLOO = (
    "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:114: Connection reset by peer"
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError(f"{GLOO}. This is typically caused by a worker"),
            "Read error [10.0.0.2]:114: Connection reset by",
        ),
        (
            dist.DistNetworkError("recvValueWithTimeout failed: Connection timed out\nframes"),
            "failed: Connection timed out",
        ),
        (RuntimeError("[enforce fail at gloo/algorithm.h:3] 4 vs 8"), None),
        (dist.DistBackendError("CUDA error: an illegal memory access"), None),
        (RuntimeError("shapes differ after a connection"), None),
        (ValueError("Connection reset by peer, says gloo"), None),
    ],
)
def test_a_lost_rank_is_told_from_a_bug(error: Exception, text: str | None) -> None:
    """A page of traceback from each of 128 ranks because one node died; a bug of ours that loses its traceback."""
    told = watchdog.lost_rank_text(error)
    assert (told is None) == (text is None)
    if text is not None:
        assert text in str(told) and "\n" not in str(told) and "typically" not in str(told)


def test_a_lost_rank_ends_in_one_line_of_each_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that says neither which rank, nor on which machine, nor for what it waited."""

    def lose(argv: Any) -> int:
        with hang_watchdog(PLACE, "micro-batch 3 from stage 1 (rank 3)"):
            raise RuntimeError(GLOO)

    monkeypatch.setattr(cli, "_run", lose)
    assert cli.main(["tune"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and platform.node() in said
    for words in ("rank 5 (stage 2, tensor 1", "for micro-batch 3 from stage 1 (rank 3)", "[10.0.0.2]:114: Connection"):
        assert words in said
