"""A rank that dies under torchrun: the launcher starts all of them anew, and they go on from the latest checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NUM_STEPS = 150


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Workers that come up again and meet their predecessors' addresses, or begin at the beginning."""
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "-m",
        "ee_tuning",
        "tune",
        "--model",
        str(ROOT / "examples" / "tiny-python-llama"),
        "--exit-layers",
        "1",
        "--architecture",
        "norm",
        "--exit-output",
        "tied",
        "--data",
        str(ROOT / "ee_tuning" / "errors.py"),
        "--output",
        str(run),
        "--train-iters",
        str(NUM_STEPS),
        "--seq-length",
        "16",
        "--micro-batch-size",
        "1",
        "--global-batch-size",
        "2",
        "--set",
        "tuning.save_interval=20",
        "--set",
        "tuning.eval_iters=0",
    ]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 120
        while not (run / "checkpoints" / "latest").exists():
            assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.005)
        ranks = [each for each in psutil.Process(launcher.pid).children() if "ee_tuning" in each.cmdline()]
        assert len(ranks) == 2
        os.kill(ranks[-1].pid, signal.SIGKILL)
        begun = (run / "metrics.jsonl").read_text().splitlines()[:20]
        assert launcher.wait(150) == 0, (tmp_path / "log").read_text()
    finally:
        launcher.kill()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert lines[:20] == begun, "the steps before the checkpoint were taken again"
    assert (run / "exit_heads" / "exit_config.json").exists()
