"""A slow cable between two machines: what 20 ms in each direction cost the relay and decoding over stages.

The figures are printed, `docs/operations.md` has the last ones; they are those of a quiet machine or of none.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from machines import Machines, missing_for_machines
from run_folders import same_heads_and_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
if reason := missing_for_machines():
    pytest.skip(reason, allow_module_level=True)
if not Path("/dev/net/tun").exists():
    pytest.skip("there is no /dev/net/tun, by which frames could be held", allow_module_level=True)

SECONDS = float(os.environ.get("EE_TUNING_CLUSTER_SECONDS", "400"))
NODES = ("node1", "node2")
HELD = 0.020
PORT = 29500
STAGES = ("--pipeline-model-parallel-size", "2")
NUM_STEPS = 12


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Machines(tmp_path_factory.mktemp("machines"), NODES) as two:
        yield two


def on_both(machines: Machines, project: Path, environment: dict[str, str], words: Sequence[str], log: str) -> str:
    """Runs `ee-tuning` with these words, a rank on each machine, and returns what they print."""
    ranks = []
    for rank, node in enumerate(NODES):
        world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "node1", "MASTER_PORT": PORT}
        variables = {**environment, "GLOO_SOCKET_IFNAME": "eth0", **{key: str(each) for key, each in world.items()}}
        command = [sys.executable, "-m", "ee_tuning", *words]
        ranks.append(machines.start(command, project / f"{log} {node}.log", node, variables, project))
    said = {}
    for node, process in zip(NODES, ranks, strict=True):
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        said[node] = (project / f"{log} {node}.log").read_text(errors="replace")
        assert code == 0, (code, said[node][-3000:])
    return "".join(said.values())


def idle_shares(run: Path) -> dict[str, float]:
    """The mean share of each stage, without the first two steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").strip().split("\n")
    records: list[dict[str, Any]] = [each for line in lines if (each := json.loads(line))["kind"] == "train"][2:]
    return {stage: sum(each["idle_share"][stage] for each in records) / len(records) for stage in ("0", "1")}


def test_the_relay_hides_a_slow_cable(
    machines: Machines, project: Path, python_first: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that waits for an answer after each micro-batch, or for the other one after each of two."""
    words = ["tune", "--model", "examples/tiny-python-llama", "--data", "my data", "--exit-layers", "3,6,9,12"]
    words += ["--init", "copy", *STAGES, "--seq-length", "512", "--micro-batch-size", "4", "--global-batch-size", "8"]
    words += ["--train-iters", str(NUM_STEPS), "--set", "tuning.eval_iters=0"]
    on_both(machines, project, python_first, [*words, "--output", "runs/near"], "near")
    with machines.slow_link("node2", HELD):
        on_both(machines, project, python_first, [*words, "--output", "runs/far"], "far")
    same_heads_and_records(project / "runs/far", project / "runs/near")
    near, far = idle_shares(project / "runs/near"), idle_shares(project / "runs/far")
    with capsys.disabled():
        print(f"\nidle shares of stages: {near} near, {far} with every frame held for {HELD * 1e3:.0f} ms")
    assert max(far.values()) < max(near.values()) + 0.1


def test_decoding_over_a_slow_cable_says_the_same(
    machines: Machines, project: Path, python_first: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Decisions that overtake each other; the cost of a round trip for each token."""
    model = ["--model", "examples/tiny-python-llama", "--policy", "full", "--max-new-tokens", "32", *STAGES]
    for count in (1, 8):
        lines = [json.dumps({"prompt": f"def f{number}("}) + "\n" for number in range(count)]
        (project / f"{count}.jsonl").write_text("".join(lines), encoding="utf-8")
        words = ["generate", "--prompts", f"{count}.jsonl", *model, "--max-batch-size", str(count)]
        said = [on_both(machines, project, python_first, [*words, "--output", f"near{count}.jsonl"], f"near {count}")]
        with machines.slow_link("node2", HELD):
            said += [
                on_both(machines, project, python_first, [*words, "--output", f"far{count}.jsonl"], f"far {count}")
            ]
        near, far = (
            [
                json.loads(line)["token_ids"]
                for line in (project / f"{name}{count}.jsonl").read_text().strip().split("\n")
            ]
            for name in ("near", "far")
        )
        assert near == far
        rates = [next(part for part in each.split(", ") if part.endswith(" tokens/s")) for each in said]
        with capsys.disabled():
            print(f"\n{count} sequences over two stages: {rates[0]} near, {rates[1]} with every frame held")
