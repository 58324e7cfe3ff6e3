"""The gain by replicas for a file of prompts: tokens/s of `generate --prompts` on two replicas of one core each,
against one replica on one core.

    python benchmarks/replicas.py --model examples/tiny-python-llama --exits runs/demo/exit_heads

Each process has one thread and is kept on a core of its own. Both worlds exist side by side, the idle one asleep, and
take turns; the best of the rounds counts. On a busy machine --realtime (as root) keeps other processes off these cores
for the seconds of a round. Loading is not timed; the sharing of prompts and the output file are. Prints the table of
docs/benchmarks.md.
"""

import argparse
import json
import os
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ee_tuning.parallel.ports import free_port

PROMPT = "import os\n\n\ndef read_{}("
_WORLDS = (1, 2)


def main() -> None:
    """Prints a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exits", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--realtime", action="store_true", help="run rounds under SCHED_RR")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < max(_WORLDS):
        raise SystemExit(f"two replicas need two cores, and this process may use {len(cores)}")
    worlds = {size: _start(size, cores, options) for size in _WORLDS}
    print("| batch | one replica, tokens/s | two | ratio |\n|---|---|---|---|")
    for batch in options.batch:
        rates: dict[int, list[float]] = {size: [] for size in _WORLDS}
        for number in range(options.rounds + 1):  # the first one warms up
            for size, ranks in worlds.items():
                rates[size].append(_round(ranks, batch, number))
        one, two = (max(rates[size][1:]) for size in _WORLDS)
        print(f"| {batch} | {one:.0f} | {two:.0f} | {two / one:.2f} |", flush=True)
    for ranks in worlds.values():
        for connection in ranks:
            connection.send(None)


def _start(size: int, cores: list[int], options: argparse.Namespace) -> list[Connection]:
    """Starts the ranks of a world."""
    spawn, port, connections = get_context("spawn"), free_port(), []
    for rank in range(size):
        ours, theirs = spawn.Pipe()
        spawn.Process(target=_work, args=(rank, size, port, cores[rank], options, theirs), daemon=True).start()
        connections.append(ours)
    for connection in connections:
        connection.recv()  # its model is loaded
    return connections


def _round(ranks: list[Connection], batch: int, number: int) -> float:
    """Returns the tokens per second of a world."""
    for connection in ranks:
        connection.send((batch, number))
    return max(connection.recv() for connection in ranks)


def _work(rank: int, size: int, port: int, core: int, options: argparse.Namespace, connection: Connection) -> None:
    os.sched_setaffinity(0, {core})
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    from ee_tuning import EarlyExitLLM
    from ee_tuning.config import load_config

    config = load_config(
        None,
        {
            "model.path": str(options.model),
            "exits.path": str(options.exits),
            "generation.policy": "threshold",
            "generation.threshold": str(options.threshold),
            "generation.max_new_tokens": options.tokens,
            "generation.ignore_eos": True,
        },
    )
    llm = EarlyExitLLM.from_config(config)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        if options.realtime:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        rate = _deliver(llm, config, *asked, options)
        if options.realtime:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        connection.send(rate)
    os._exit(0)  # an orderly end of the process groups takes seconds


def _deliver(llm: Any, config: Any, batch: int, number: int, options: argparse.Namespace) -> float:
    """Completes the prompts into a file, as the command does, and returns the tokens per second."""
    from ee_tuning.generation.many import deliver
    from ee_tuning.generation.prompts import requests_of

    lines = [{"prompt": PROMPT.format(f"{number}_{place}")} for place in range(options.prompts)]
    section, requests = requests_of(llm, [], lines)
    section = type(section)(**{**vars(section), "max_batch_size": batch})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "completions.jsonl"
        llm.model.topology.barrier()
        began = time.perf_counter()
        deliver(llm, config, requests, section, output, overwrites=False)
        seconds = time.perf_counter() - began
        if not llm.model.topology.is_logging_rank:
            return 0.0
        records = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    return sum(len(record["token_ids"]) for record in records) / seconds


if __name__ == "__main__":
    main()
