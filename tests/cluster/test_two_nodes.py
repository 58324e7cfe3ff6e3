"""Two machines under torchrun, without Slurm: cables that are pulled, machines that vanish, and what comes of it.

The rendezvous' store lies on a third machine, so that each of the two may vanish.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, missing_for_machines, wait_until
from run_folders import same_heads_and_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
if reason := missing_for_machines():
    pytest.skip(reason, allow_module_level=True)

SECONDS = float(os.environ.get("EE_TUNING_CLUSTER_SECONDS", "400"))
NODES = ("node1", "node2")
OVER_STAGES = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
OVER_REPLICAS = ("--tensor-model-parallel-size", "2")
FLAGS = (
    *("--model", "examples/tiny-python-llama", "--data", "my data", "--exit-layers", "3,6,9,12"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "64", "--set", "tuning.save_interval=10"),
)
PORT = 29400
STORE = f"import time, torch.distributed as dist; store = dist.TCPStore('controller', {PORT}, is_master=True); time.sleep(36000)"
"""A rendezvous of torchrun (c10d) in one line, as docs/operations.md has it."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    with Machines(folder, NODES) as two:
        two.start([sys.executable, "-c", STORE], folder / "store.log")
        yield two


class Launch:
    """`torchrun` on each of the two, into one run folder."""

    def __init__(
        self, machines: Machines, project: Path, environment: dict[str, str], run: str, *flags: str, nodes: str = "2"
    ) -> None:
        self.machines, self.project, self.run = machines, project, project / run
        # Without the second one, torch's first node keeps to itself where a node that joins later finds the others.
        self.environment = {**environment, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.command = ["torchrun", "--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", "2"]
        self.command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"controller:{PORT}", "--rdzv-id", Path(run).name]
        self.command += ["--rdzv-conf", "last_call_timeout=5", "-m", "ee_tuning", "tune", *FLAGS, *flags]
        self.command += ["--output", run]
        self.agents = {node: self.start(node) for node in NODES}

    def start(self, node: str) -> subprocess.Popen[str]:
        """Starts the node's torchrun."""
        return self.machines.start(self.command, self.log(node), node, self.environment, self.project)

    def log(self, node: str) -> Path:
        return self.project / f"{self.run.name} {node}.log"

    def said(self, node: str = "node1") -> str:
        return self.log(node).read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []

    def step(self) -> int:
        """The last step in the records."""
        return int((self.records() or [{"step": 0}])[-1]["step"])

    def wait_for_step_after(self, step: int) -> None:
        wait_until(f"a step after {step}", lambda: self.step() > step, SECONDS)

    def lose(self, node: str, other: str) -> None:
        """Ends all of the node at once, and waits until the other one has noticed."""
        before = self.said(other).count("lost another rank") + self.said(other).count("in vain")
        self.machines.crash(node)
        noticed = ("lost another rank", "in vain")
        wait_until(f"{other} has noticed", lambda: sum(map(self.said(other).count, noticed)) > before, 120)

    def wait_for_end(self) -> None:
        for node, agent in self.agents.items():
            assert agent.wait(SECONDS) == 0, self.said(node)[-3000:]


def test_a_run_survives_a_pulled_cable_and_machines_that_vanish(
    machines: Machines, project: Path, python_first: dict[str, str]
) -> None:
    """A run that ends where packets are late by seconds; a launcher that starts anew and does not go on, because the
    machine that takes the lost one's place counts its attempts from 0; lost steps.
    """
    whole = Launch(machines, project, python_first, "runs/whole", *OVER_STAGES, "--train-iters", "60")
    whole.wait_for_end()
    launch = Launch(machines, project, python_first, "runs/shaken", *OVER_STAGES, "--train-iters", "60")
    launch.wait_for_step_after(11)
    machines.set_link("node2", is_up=False)
    time.sleep(5)
    machines.set_link("node2", is_up=True)
    launch.wait_for_step_after(launch.step())
    for node, other in (("node2", "node1"), ("node1", "node2")):
        launch.lose(node, other)
        before = launch.step()
        launch.agents[node] = launch.start(node)
        if node == "node2":
            launch.wait_for_step_after(before)
    launch.wait_for_end()
    assert "could not take back" not in launch.said()
    same_heads_and_records(launch.run, whole.run)


def test_a_run_goes_on_with_the_machines_that_are_left_and_with_those_that_come(
    machines: Machines, project: Path, python_first: dict[str, str]
) -> None:
    """`--nnodes 1:2`: replicas that are lost with their machine and stop the run, or come back and train by themselves;
    steps that are taken twice or with another batch.
    """
    flags = (*OVER_REPLICAS, "--train-iters", "120")
    whole = Launch(machines, project, python_first, "runs/two replicas", *flags)
    whole.wait_for_end()
    launch = Launch(machines, project, python_first, "runs/one or two replicas", *flags, nodes="1:2")
    launch.wait_for_step_after(11)
    launch.lose("node2", "node1")
    launch.wait_for_step_after(launch.step())
    launch.agents["node2"] = launch.start("node2")
    launch.wait_for_end()
    got, wanted = launch.records(), whole.records()
    assert [each["step"] for each in got] == [each["step"] for each in wanted]
    assert got[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=1e-3)


def test_a_cable_pulled_for_good_is_reported_by_rank_and_peer(
    machines: Machines, project: Path, python_first: dict[str, str]
) -> None:
    """A run that hangs for ever, or ends in a traceback that names neither rank nor address."""
    flags = (*OVER_STAGES, "--train-iters", "5000", "--set", "parallel.distributed_timeout_minutes=0.75")
    launch = Launch(machines, project, python_first, "runs/cut", *flags)
    launch.wait_for_step_after(0)
    machines.set_link("node2", is_up=False)
    try:
        wait_until("both machines report it", lambda: all("in vain" in launch.said(node) for node in NODES), 200)
    finally:
        for agent in launch.agents.values():
            agent.kill()
        for node in NODES:
            machines.crash(node)
        machines.set_link("node2", is_up=True)
    lines = [line for node in NODES for line in launch.said(node).split("\n") if "in vain" in line]
    assert all(line.count("rank ") >= 2 for line in lines) and "Traceback" not in launch.said()
    assert any("ee-tuning: error: rank 0 (stage 0, tensor 0, replica 0) waited" in line for line in lines), lines
