"""Decoding beside other busy processes: the remaining speed, by how long OpenMP's threads spin before they sleep.

    python benchmarks/under_load.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Threads that wait for each other at a barrier spin first. A spinning thread looks busy: on a shared core, it gets the
time that the thread it waits for needs. One process for each setting of GOMP_SPINCOUNT takes its turn, alone and beside
`--busy` processes that count; the ratio is of the same process in the same minutes. `--real-time` (needs root) keeps
everything else that runs on the machine off its cores while nothing is to be beside it, so that an idle machine can be
had on a busy one.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from real_time import set_real_time

SETTINGS = {
    "OpenMP's own": {},
    "1000, as ee-tuning sets it": {"GOMP_SPINCOUNT": "1000"},
    "none": {"GOMP_SPINCOUNT": "0"},
}
BUSY = "while True: pass"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny-python-llama")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--busy", type=int, default=1, help="processes beside it (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of a measurement (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--real-time", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    rates = _measure(options)
    print(
        f"\n{options.model}, {options.dtype}, batch 1, {options.threads} threads, medians of {options.rounds} × {options.new_tokens} "
        f"tokens\n\n| spins | tokens/s alone | beside {options.busy} busy | ratio |\n|---|---|---|---|"
    )
    for name, (alone, beside) in rates.items():
        print(
            f"| {name} | {statistics.median(alone):.4g} | {statistics.median(beside):.4g} | "
            f"{statistics.median(beside) / statistics.median(alone):.2f} |"
        )


def _measure(options: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in SETTINGS}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(setting, options.threads)) for name, setting in SETTINGS.items()}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for name, worker in workers.items():
                for place, num_busy in enumerate((0, options.busy)):
                    with _busy(num_busy):
                        rates[name][place].append(
                            _ask(worker, "real-time" if options.real_time and not num_busy else "plain")
                        )
    return rates


@contextlib.contextmanager
def _worker(setting: dict[str, str], threads: int) -> Iterator["subprocess.Popen[str]"]:
    known = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker", *sys.argv[1:]],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**known, **setting, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        _ask(worker, "plain")  # pays for one-time work of the process
        yield worker
    finally:
        worker.kill()
        worker.wait()


def _ask(worker: "subprocess.Popen[str]", how: str) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(how + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _work(options: argparse.Namespace) -> None:
    """Decodes whenever a line arrives, and answers with tokens per second."""
    from ee_tuning import EarlyExitLLM

    llm = EarlyExitLLM.load(options.model, dtype=options.dtype)
    keys = {"policy": "full", "ignore_eos": True, "reuse_prefixes": False}
    llm.generate(["Once upon a time"], max_new_tokens=2, **keys)
    for how in sys.stdin:
        set_real_time(how.strip() == "real-time")
        began = time.perf_counter()
        llm.generate(["Once upon a time there was"], max_new_tokens=options.new_tokens, **keys)
        rate = options.new_tokens / (time.perf_counter() - began)
        set_real_time(False)
        print(rate, flush=True)


if __name__ == "__main__":
    main()
