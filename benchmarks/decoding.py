"""Speed of decoding: full depth against transformers' `generate`, `fixed` at each exit and threshold 0.8 against what
their depth implies.

    python benchmarks/decoding.py --exits runs/demo/exit_heads
    python benchmarks/decoding.py --only 300M --new-tokens 24 --rounds 2 --threads 1 --json decoding.json

For the shipped model and random ones of about 30M and 300M parameters, at batch 1 and 8. In every round each way of
decoding runs once, so that a slow moment of the machine affects all alike; a ratio is the median over rounds of the
round's own ratio. Times are of whole generations, greedy, the same number of new tokens: ours from text to text,
transformers' from ids to ids, by its faster cache.

What depth implies is computed from the engine's own layers and heads, called bare in the same round (decoding_bare.py):
every layer that a token ran through and every head that was asked about it, also without success. At batch 8 rows that
leave save that share of a step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoding_bare import BareTimes, bare_times
from decoding_theirs import CACHES, Theirs
from held_out import held_out_prompts
from random_model import SHIPPED_MODEL, Folders, num_parameters, write_exits, write_random_model

from ee_tuning import EarlyExitLLM
from ee_tuning.evaluation.quality import agreement

PROMPT_BYTES, THRESHOLD, BATCHES = 200, 0.8, (1, 8)
WIDE = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}

Round = dict[str, float]
"""Seconds of each way of decoding in one round, by its name."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A ratio and its goal."""

    model: str
    batch: int
    words: str
    value: float
    goal: float


@dataclass(kw_only=True)
class Result:
    """One model at one batch size."""

    model: str
    batch: int
    rates: dict[str, float] = field(default_factory=dict)
    """Tokens per second of whole generations, all sequences together, medians over the rounds."""
    mean_depth: float = 0.0
    agreement: float = 0.0
    """Share of the threshold policy's tokens that the full model predicts after the same prefix."""
    claims: list[Claim] = field(default_factory=list)


def main() -> None:
    """Measures the models and prints the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as name:
        for model in options.only:
            folders = _folders(model, options, Path(name, model))
            size = f"{model} ({num_parameters(folders.model) / 1e6:.1f}M)"
            tokens = options.new_tokens // (8 if model == "300M" else 1)
            llm, theirs = EarlyExitLLM.load(folders.model, folders.exits), Theirs(folders.model)
            results += [measure(size, llm, theirs, batch, tokens, options.rounds) for batch in options.batches]
    print(
        f"\n{options.new_tokens} new tokens (300M: {options.new_tokens // 8}) after prompts of {PROMPT_BYTES} bytes, float32, "
        f"{options.threads} thread(s), medians of {options.rounds} rounds\n"
    )
    _print_tables(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="the shipped model; its tokenizer serves the random ones too"
    )
    parser.add_argument("--exits", type=Path, help="its exit heads; default untuned ones, copied from it")
    parser.add_argument("--only", nargs="+", choices=["shipped", "30M", "300M"], default=["shipped", "30M", "300M"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument(
        "--new-tokens", type=int, default=192, help="an eighth of it with the model of 300M (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def _folders(model: str, options: argparse.Namespace, folder: Path) -> Folders:
    if model == "shipped":
        return Folders(options.model, options.exits or write_exits(options.model, folder))
    if model == "30M":
        return write_random_model(folder, options.model)
    return write_random_model(folder, options.model, (6, 12, 18), **WIDE)


def measure(name: str, llm: EarlyExitLLM, theirs: Theirs, batch: int, new_tokens: int, num_rounds: int) -> Result:
    """Measures one model at one batch size. Fixed exits are measured at batch 1 only."""
    prompts = held_out_prompts(batch, PROMPT_BYTES)
    ids = [llm.encode(prompt) for prompt in prompts]
    ours: dict[str, dict[str, Any]] = {
        "full": {"policy": "full"},
        "threshold": {"policy": "threshold", "threshold": THRESHOLD},
    }
    if batch == 1:
        ours.update({f"fixed {layer}": {"policy": "fixed", "exit_layer": layer} for layer in llm.exit_layers})
    ways: dict[str, Callable[[int], Any]] = {
        way: partial(_generate, llm, prompts, choice) for way, choice in ours.items()
    }
    ways.update({cache: partial(theirs.generate, ids, cache) for cache in CACHES})
    said: dict[str, Any] = {}
    for call in ways.values():
        call(min(new_tokens, 16))  # a process's first passes pay for allocations
    rounds, bare = [], []
    for index in range(num_rounds):
        print(f"{name}, batch {batch}: round {index + 1} of {num_rounds}", file=sys.stderr, flush=True)
        seconds = {}
        for way, call in ways.items():
            began = time.perf_counter()
            said[way] = call(new_tokens)
            seconds[way] = time.perf_counter() - began
        rounds.append(seconds)
        bare.append(bare_times(llm, len(ids[0]), new_tokens, batch))
    return _result(name, llm, batch, new_tokens, rounds, bare, said)


def _generate(llm: EarlyExitLLM, prompts: list[str], choice: dict[str, Any], new_tokens: int) -> Any:
    # Every generation reads its prompts again, because transformers keeps nothing of them.
    return llm.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True, reuse_prefixes=False, **choice)


def _result(
    name: str,
    llm: EarlyExitLLM,
    batch: int,
    new_tokens: int,
    rounds: list[Round],
    bare: list[BareTimes],
    said: dict[str, Any],
) -> Result:
    def ratio(of: str, to: str) -> float:
        return statistics.median(r[to] / r[of] for r in rounds)

    medians = {way: statistics.median(r[way] for r in rounds) for way in rounds[0]}
    depths = [layer for completion in said["threshold"] for layer in completion.exit_layers]
    result = Result(
        model=name,
        batch=batch,
        rates={way: batch * new_tokens / seconds for way, seconds in medians.items()},
        mean_depth=sum(depths) / len(depths),
        agreement=statistics.mean(agreement(llm, completion) for completion in said["threshold"]),
    )

    def claim(words: str, value: float, goal: float) -> None:
        result.claims.append(Claim(model=name, batch=batch, words=words, value=value, goal=goal))

    best = min(CACHES, key=lambda cache: medians[cache])
    same = statistics.mean(
        a == b
        for mine, other in zip(said["full"], said[best], strict=True)
        for a, b in zip(mine.token_ids, other, strict=True)
    )
    claim(f"full depth ÷ transformers, {best} cache (same tokens {same:.0%})", ratio("full", best), 1.2)
    for index, layer in enumerate(llm.exit_layers if batch == 1 else ()):
        ideal = [b.full() / b.fixed(index) for b in bare]
        gained = [r["full"] / r[f"fixed {layer}"] for r in rounds]
        claim(
            f"fixed at {layer}: speed-up {statistics.median(gained):.2f} ÷ {statistics.median(ideal):.2f} of its layers and head",
            statistics.median(g / i for g, i in zip(gained, ideal, strict=True)),
            0.9,
        )
    implied = [b.full() / b.implied(depths, list(llm.exit_layers)) for b in bare]
    gained = [r["full"] / r["threshold"] for r in rounds]
    claim(
        f"threshold {THRESHOLD}: speed-up {statistics.median(gained):.2f} ÷ {statistics.median(implied):.2f} implied by mean depth "
        f"{result.mean_depth:.1f} and its heads",
        statistics.median(g / i for g, i in zip(gained, implied, strict=True)),
        0.9 if batch == 1 else 0.8,
    )
    return result


def _print_tables(results: list[Result]) -> None:
    print("| model | batch | way | tokens/s |\n|---|---|---|---|")
    for r in results:
        for way, rate in r.rates.items():
            words = {
                "full": "full depth",
                "dynamic": "transformers, dynamic cache",
                "static": "transformers, static cache",
            }.get(way, way)
            if way == "threshold":
                words = f"threshold {THRESHOLD}: mean depth {r.mean_depth:.1f}, agreement {r.agreement:.1%}"
            print(f"| {r.model} | {r.batch} | {words} | {rate:.0f} |")
    print("\n| model | batch | claim | measured | goal | met |\n|---|---|---|---|---|---|")
    for c in [claim for result in results for claim in result.claims]:
        print(
            f"| {c.model} | {c.batch} | {c.words} | {c.value:.2f} | ≥ {c.goal} | {'yes' if c.value >= c.goal else 'no'} |"
        )


if __name__ == "__main__":
    main()
