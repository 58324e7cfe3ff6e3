"""Decoding over two pipeline stages: with exits in the first one against full depth, and how busy the stages are.

    python benchmarks/decoding_pipeline.py --exits runs/demo/exit_heads
    python benchmarks/decoding_pipeline.py --only 30M --batch 1 8 --rounds 5

Two processes of one thread and core each, gloo between them, six layers on each, exits asked after layers 3 and 6
alone: in the first stage. Every round takes each way of decoding in turn; a ratio is the median over rounds of the
round's own ratio to full depth. `threshold` is run with the second stage filling the keys and values of tokens that
left by four, by eight, and when a token comes that goes deeper or 16 wait.
The random model's exits are sure of nothing, so its threshold is that which a share of tokens (`--leaving`) passes at
layer 6. A stage is busy when it does not wait for the other one.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import SHIPPED_MODEL, Folders, write_exits, write_random_model
from rank_processes import run_ranks

from ee_tuning import EarlyExitLLM
from ee_tuning.config import load_config
from ee_tuning.engine import engine as engine_module

PROMPTS = [
    '"""Read settings from a file."""\nimport os\n\n\ndef read_settings(path, defaults=None):\n',
    "class Stack:\n    def push(self, x):\n",
    "import json\nimport sys\n\n\ndef main():\n",
    "def test_empty():\n    ",
    "for name in sorted(names):\n    ",
    "try:\n    value = int(text)\nexcept ValueError:\n",
    "class Node:\n    def __init__(self, ",
    "def fibonacci(n):\n    ",
]
LAYOUT, LAST_EXIT = (6, 6), 6
NEVER = 1.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of decoding."""

    model: str
    batch: int
    way: str
    tokens_per_second: float
    to_full_depth: float
    mean_depth: float
    busy: tuple[float, ...]
    """Share of the time in which each stage was busy."""


def main() -> None:
    """Measures every model and batch, and prints the table."""
    options = _options()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            if name == "30M":
                folders = write_random_model(Path(folder, "30m"), SHIPPED_MODEL)
            else:
                folders = Folders(SHIPPED_MODEL, options.exits or write_exits(SHIPPED_MODEL, Path(folder, "shipped")))
            rows += run_ranks(len(LAYOUT), _rows_of, name, folders, options)[0]
    print(
        f"\n{options.new_tokens} new tokens after each prompt, greedy, float32, two processes of one thread, medians of "
        f"{options.rounds} rounds\n"
    )
    print(
        "| model | batch | way | mean depth | tokens/s | ÷ full depth | busy, by stage |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row.model} | {row.batch} | {row.way} | {row.mean_depth:.1f} | {row.tokens_per_second:.0f} | {row.to_full_depth:.2f} | "
            f"{', '.join(f'{share:.0%}' for share in row.busy)} |"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--exits", type=Path, help="the shipped model's exit heads; default untuned ones, copied from it"
    )
    parser.add_argument("--only", nargs="+", choices=["shipped", "30M"], default=["shipped", "30M"])
    parser.add_argument("--ways", nargs="+", help="only ways that begin so; full depth is always measured")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threshold", type=float, default=0.6, help="of the shipped model")
    parser.add_argument(
        "--leaving", type=float, default=0.7, help="share of the random model's tokens that leave at layer 6"
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def _rows_of(name: str, folders: Folders, options: argparse.Namespace) -> list[Row]:
    llm = EarlyExitLLM.from_config(
        load_config(
            None,
            {
                "model.path": str(folders.model),
                "exits.path": str(folders.exits),
                "parallel.pipeline_model_parallel_size": len(LAYOUT),
                "parallel.pipeline_layout": list(LAYOUT),
            },
        )
    )
    return [row for batch in options.batch for row in _measure(llm, name, batch, options)]


def _measure(llm: EarlyExitLLM, name: str, batch: int, options: argparse.Namespace) -> list[Row]:
    """Measures every way of decoding a batch. All ranks get the same rows except for their own clocks; those of rank 0
    are printed.
    """
    threshold = options.threshold
    if name == "30M":
        threshold = _passed_by(llm, options.leaving)
    ways = _ways(llm, threshold, options.ways)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[list[float]]] = {way: [] for way in ways}
    depth: dict[str, float] = {}
    for index in range(options.rounds + 1):  # the first run pays for allocations, and speculation measures its costs
        for way, (keys, fill_behind) in ways.items():
            elapsed, shares, depth[way] = _generate(llm, batch, options.new_tokens, keys, fill_behind)
            if index:
                seconds[way].append(elapsed)
                busy[way].append(shares)
    return [
        Row(
            model=name,
            batch=batch,
            way=way,
            mean_depth=depth[way],
            tokens_per_second=batch * options.new_tokens / statistics.median(seconds[way]),
            to_full_depth=statistics.median(
                full / mine for full, mine in zip(seconds["full depth"], seconds[way], strict=True)
            ),
            busy=tuple(statistics.median(each[stage] for each in busy[way]) for stage in range(len(LAYOUT))),
        )
        for way in ways
    ]


def _ways(llm: EarlyExitLLM, threshold: float, wanted: list[str] | None) -> dict[str, tuple[dict[str, Any], int]]:
    """Returns way -> options, and the number of tokens that may be pending at the second stage before it runs them."""

    def at(*asked: int) -> dict[str, Any]:
        return {
            "policy": "threshold",
            "threshold": [threshold if layer in asked else NEVER for layer in llm.exit_layers],
        }

    ways = {
        "full depth": ({"policy": "full"}, 1),
        f"fixed at layer {LAST_EXIT}": ({"policy": "fixed", "exit_layer": LAST_EXIT}, 1),
    }
    for words, keys in (
        (f"threshold {threshold:.3g} at layer 6", at(6)),
        (f"threshold {threshold:.3g} at layers 3 and 6", at(3, 6)),
    ):
        ways |= {
            f"{words}, filled by 4": (keys, 4),
            f"{words}, filled by 8": (keys, 8),
            f"{words}, filled on demand": (keys, 16),
        }
    ways["speculative"] = ({"policy": "speculative"}, 1)
    return {
        way: what
        for way, what in ways.items()
        if wanted is None or way == "full depth" or way.startswith(tuple(wanted))
    }


def _passed_by(llm: EarlyExitLLM, share: float) -> float:
    """Returns the confidence that a share of tokens reaches at layer 6, if all of them leave there."""
    made = llm.generate(PROMPTS[:1], policy="fixed", exit_layer=LAST_EXIT, max_new_tokens=128, ignore_eos=True)
    return sorted(made[0].confidences)[int((1 - share) * len(made[0].confidences))]


def _generate(
    llm: EarlyExitLLM, batch: int, new_tokens: int, keys: dict[str, Any], fill_behind: int
) -> tuple[float, list[float], float]:
    """Returns the seconds, the share of them that each stage was busy, and the mean layer at which tokens left."""
    prompts = (PROMPTS * -(-batch // len(PROMPTS)))[:batch]
    engine_module.MOST_PENDING_AT_STAGE = fill_behind
    llm.model.topology.barrier()
    waited = llm.engine.link.seconds_waited if llm.engine is not None else 0.0
    began = time.perf_counter()
    made = llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True, **keys)
    elapsed = time.perf_counter() - began
    assert llm.engine is not None
    shares = torch.zeros(len(LAYOUT), dtype=torch.float64)
    shares[llm.model.topology.stage] = 1 - (llm.engine.link.seconds_waited - waited) / elapsed
    torch.distributed.all_reduce(shares, group=llm.model.topology.replica_control)
    layers = [layer for each in made for layer in each.exit_layers]
    return elapsed, shares.tolist(), sum(layers) / len(layers)


if __name__ == "__main__":
    main()
