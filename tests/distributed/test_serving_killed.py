"""A rank of a server that is killed: the other one ends with a line that says so, and does not hang."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from ee_tuning.parallel.ports import free_port

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")

ROOT = Path(__file__).parents[2]


def start() -> list[subprocess.Popen[str]]:
    """Two ranks of a server, which no launcher watches."""
    model = str(ROOT / "examples" / "tiny-python-llama")
    command = [sys.executable, "-m", "ee_tuning", "serve", "--model", model, "--policy", "full", "--port", "0"]
    command += ["--pipeline-model-parallel-size", "2", "--set", "parallel.distributed_timeout_minutes=1"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(2)
    ]


def ask(address: str) -> None:
    """Asks for more tokens than there will be."""
    body = json.dumps({"prompt": "a", "max_tokens": 900, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(OSError):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize(("killed", "is_busy"), [(1, True), (0, False)], ids=["busy", "idle"])
def test_the_rank_that_is_left_ends(killed: int, is_busy: bool) -> None:
    """A server that takes requests and answers none, because a rank that it waits for is gone."""
    ranks = start()
    try:
        stderr = ranks[0].stderr
        assert stderr is not None
        address = next(found[1] for line in stderr if (found := re.search(r"(http://\S+) serves", line)))
        asking = threading.Thread(target=ask, args=(address,), daemon=True)
        if is_busy:
            asking.start()
            time.sleep(0.3)
        began = time.monotonic()
        ranks[killed].kill()
        _, said = ranks[1 - killed].communicate(timeout=90)
        assert time.monotonic() - began < 60
        assert ranks[1 - killed].returncode not in (0, -signal.SIGKILL)
        assert f"rank {1 - killed} " in said and "Traceback" not in said, said
        assert is_busy or "commands from rank 0" in said, said
    finally:
        for rank in ranks:
            rank.kill()
