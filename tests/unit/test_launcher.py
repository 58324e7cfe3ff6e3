"""What a launcher says in the environment: a world of one needs no address, and what makes no sense is one line."""

import os

import pytest

from ee_tuning import cli
from ee_tuning.errors import InputError
from ee_tuning.parallel.launcher import (
    LaunchedRank,
    adopt_slurm_step,
    check_address,
    first_host,
    is_first,
    launched_rank,
    local_rank,
)

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def say(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, LaunchedRank(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, LaunchedRank(3, 4)),
    ],
)
def test_a_place_is_what_both_variables_say(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: LaunchedRank | None
):
    """A variable that a shell has left, taken for a launcher."""
    say(monkeypatch, environment)
    assert launched_rank() == place and is_first() == (place is None or place.rank == 0)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "RANK=0 alone"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "below WORLD_SIZE"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "'a'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "'-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "1.0"}, "'1.0'"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK in the environment"),
        ({"WORLD_SIZE": "many"}, "'many'"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], words: str
):
    """A traceback of int(), or a command that fails without a word, for its rank is not the one that tells."""
    say(monkeypatch, environment)
    with pytest.raises(InputError, match=words):
        launched_rank()
    assert cli.main(["no such command"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ee-tuning: error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "MASTER_ADDR, and the environment has none"),
        ({"MASTER_ADDR": "a"}, "has none"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x"}, "'x'"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "65536"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "0"}, "'0'"),
    ],
)
def test_several_processes_need_an_address(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str):
    """A traceback of torch's rendezvous."""
    say(monkeypatch, environment)
    with pytest.raises(InputError, match=words):
        check_address(LaunchedRank(0, 2))
    say(monkeypatch, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "gpu"})
    check_address(LaunchedRank(0, 2))
    with pytest.raises(InputError, match="LOCAL_RANK"):
        local_rank()


STEP = {
    "SLURM_JOB_ID": "15017",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[09-10]",
}
"""What srun sets for the last of four tasks on two nodes, in so far as it is read."""


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (STEP, ["3", "4", "1", "gpu09", "15017"]),
        ({**STEP, "WORLD_SIZE": "8"}, ["3", "4", "1", "gpu09", "15017"]),
        ({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "7"}, ["3", "4", "1", "ib0", "7"]),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "2"}, ["0", "2", None, None, None]),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, [None] * 5),
        ({"SLURM_JOB_ID": "15017", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, [None] * 5),
    ],
)
def test_tasks_of_srun_are_ranks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: list[str | None]
) -> None:
    """Four tasks that each do the whole work and write one output; workers of a torchrun that srun started, or a batch
    script's own commands, taken for tasks.
    """
    for name in os.environ:
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    say(monkeypatch, environment)
    for name in NAMES:  # restored after the test, whatever it sets
        monkeypatch.setitem(os.environ, name, os.environ.get(name, ""))
    adopt_slurm_step()
    assert [
        os.environ[name] or None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    ] == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("gpu[007-009,12],login", "gpu007"), ("r[2-3]n[4,9]", "r2n4"), ("", "")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    """An address with brackets; a rack's number kept as a range."""
    assert first_host(nodes) == first
