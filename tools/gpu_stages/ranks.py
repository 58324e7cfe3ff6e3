"""Starts processes that join one world as its ranks, and waits for their results for a limited time."""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ee_tuning.parallel.ports import free_port


def run_ranks(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    *,
    size: int,
    seconds: float,
    environment: dict[str, str],
) -> list[Any]:
    """Returns the result of a module's `function(*arguments)` on each of `size` ranks, read back from JSON.
    `environment` is added to theirs.

    Raises RuntimeError with the traceback of every rank that failed, or the stacks of those that hang after `seconds`.
    """
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # If the machine's name can not be resolved, the ranks have no other address to meet at.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **environment,
    }
    spawn = get_context("spawn")
    processes = [
        spawn.Process(target=_work, args=(rank, common, function, arguments, folder, seconds), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    for process in processes:
        process.kill()
        process.join()
    found = [folder / f"rank{rank}.json" for rank in range(size)]
    told = [
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"error": _stacks(path)} for path in found
    ]
    if problems := [f"rank {rank}: {each['error']}" for rank, each in enumerate(told) if "error" in each]:
        raise RuntimeError("\n".join(problems))
    return [each["found"] for each in told]


def _work(
    rank: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    seconds: float,
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    path = folder / f"rank{rank}.json"
    with path.with_suffix(".stacks").open("w", encoding="utf-8") as stacks, redirect_stdout(sys.stderr):
        faulthandler.dump_traceback_later(seconds - 2, file=stacks)
        try:
            told = {"found": function(*arguments)}
        except Exception:
            told = {"error": traceback.format_exc()[-5000:]}
        faulthandler.cancel_dump_traceback_later()
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(told), encoding="utf-8")
    partial.rename(path)
    sys.stderr.flush()
    os._exit(0)  # otherwise the ranks wait for groups whose other ranks are gone


def _stacks(path: Path) -> str:
    stacks = path.with_suffix(".stacks")
    said = stacks.read_text(encoding="utf-8") if stacks.exists() else ""
    return f"still at work when its time was over:\n{said[-4000:]}" if said else "it ended without a word"
