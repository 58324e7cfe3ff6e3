"""Speed of decoding at batch 1: full depth against transformers' `generate`, half depth against its ideal, and threshold 0.8.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --threads 1 --rounds 9 --exits runs/demo/exit_heads --json decoding.json

For the shipped model and a random one of 30M parameters. In every round each way of decoding takes its turn, so that a slow moment of the
machine falls on all alike. A ratio is the median over rounds of the round's own ratio. Times are of whole generations, greedy, the same
number of new tokens: ours from text to text, transformers' from ids to ids.

The ideal speed-up of half depth is (all layers + final head) / (half of them + exit head), twice: in measured time of the engine's own
layers and heads, called one after the other over the same prompt and as many tokens in the same round; and in parameters. It can be
exceeded: at full depth the engine passes every exit, asked or not, and the bare layers do not.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_model import SHIPPED_MODEL, Folders, num_parameters, write_exits, write_random_model

from ee_tuning import EarlyExitLLM
from ee_tuning.generation.engine import Engine
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_attention import ragged_batch
from ee_tuning.parallel.vocab import top1

PROMPT = '''"""Read settings from a file, with defaults for what it leaves out."""
import os
import sys


def read_settings(path, defaults=None):
    """Return a dictionary of the settings in the file.
'''
CACHES = ("dynamic", "static")
GOALS = {"full ÷ transformers": 1.0, "half depth ÷ ideal": 0.85}
THRESHOLD = 0.8

Round = dict[str, float]
"""Seconds of each way of decoding in one round, by its name."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model's figures. Rates are tokens per second of whole generations, medians over the rounds."""

    model: str
    million_parameters: float
    rates: dict[str, float]
    decode_only_rates: dict[str, float]
    """Of the tokens after the first, the time until the first one subtracted."""
    best_cache: str
    same_tokens: float
    """Share of full depth's tokens equal to those of transformers at the same place."""
    ratio_to_transformers: float
    decode_only_ratio: float
    half_layer: int
    half_speedup: float
    ideal_speedup: float
    """By the measured time of layers and heads."""
    ideal_by_parameters: float
    half_to_ideal: float
    threshold_speedup: float
    threshold_mean_depth: float


def main() -> None:
    """Measures both models and prints the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        shipped, wide = Path(folder, "shipped"), Path(folder, "30m")
        models = {"shipped": Folders(options.model, options.exits or write_exits(options.model, shipped)),
                  "30M": write_random_model(wide, options.model)}
        results = [measure(name, models[name], options.new_tokens, options.rounds) for name in options.only or models]
    tuned = "tuned" if options.exits else "untuned"
    print(f"\n{options.new_tokens} new tokens after a prompt of {len(PROMPT.encode())} bytes, float32, batch 1, "
          f"{options.threads} thread(s), medians of {options.rounds} rounds; exits of the shipped model {tuned}, of the other untuned\n")
    _print_tables(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="the shipped model; its tokenizer serves the random one too")
    parser.add_argument("--exits", type=Path, help="its exit heads; default untuned ones, copied from it")
    parser.add_argument("--only", nargs="+", choices=["shipped", "30M"])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def measure(name: str, folders: Folders, new_tokens: int, num_rounds: int) -> Result:
    """All figures of one model."""
    llm = EarlyExitLLM.load(folders.model, folders.exits)
    half = llm.num_layers // 2
    ours: dict[str, dict[str, Any]] = {"full": {"policy": "full"}, "half": {"policy": "fixed", "exit_layer": half},
                                       "threshold": {"policy": "threshold", "threshold": THRESHOLD}}
    theirs = transformers_model(folders.model)
    said: dict[str, Any] = {}

    def one_round(num_tokens: int) -> Round:
        seconds = {}
        for way, choice in ours.items():
            seconds[way], said[way] = _timed(partial(_generate, llm, num_tokens, choice))
        for cache in CACHES:
            seconds[cache], said[cache] = _timed(partial(theirs, llm.tokenizer, num_tokens, cache))
        return seconds

    one_round(new_tokens)  # a process's first passes pay for allocations
    rounds, first_tokens, ideals = [], [], []
    for index in range(num_rounds):
        print(f"{name}: round {index + 1} of {num_rounds}", file=sys.stderr, flush=True)
        first_tokens.append(one_round(1))
        ideals.append(ideal_speedup(llm, half, new_tokens))
        rounds.append(one_round(new_tokens))
    return _result(name, folders, llm, new_tokens, half, rounds, first_tokens, ideals, said)


def _result(name: str, folders: Folders, llm: EarlyExitLLM, new_tokens: int, half: int, rounds: list[Round], first_tokens: list[Round],
            ideals: list[float], said: dict[str, Any]) -> Result:
    after = [{way: whole[way] - first[way] for way in whole} for whole, first in zip(rounds, first_tokens, strict=True)]
    medians = {way: statistics.median(r[way] for r in rounds) for way in rounds[0]}
    best = min(CACHES, key=lambda cache: medians[cache])
    speedups = [r["full"] / r["half"] for r in rounds]
    full, reference = said["full"].token_ids, said[best]
    depths = said["threshold"].exit_layers
    return Result(
        model=name, million_parameters=num_parameters(folders.model) / 1e6, best_cache=best, half_layer=half,
        rates={way: new_tokens / seconds for way, seconds in medians.items()},
        decode_only_rates={way: (new_tokens - 1) / statistics.median(r[way] for r in after) for way in after[0]},
        same_tokens=sum(a == b for a, b in zip(full, reference, strict=True)) / new_tokens,
        ratio_to_transformers=statistics.median(r[best] / r["full"] for r in rounds),
        decode_only_ratio=statistics.median(r[best] / r["full"] for r in after),
        half_speedup=statistics.median(speedups), ideal_speedup=statistics.median(ideals),
        ideal_by_parameters=ideal_by_parameters(llm, half),
        half_to_ideal=statistics.median(speedup / ideal for speedup, ideal in zip(speedups, ideals, strict=True)),
        threshold_speedup=statistics.median(r["full"] / r["threshold"] for r in rounds),
        threshold_mean_depth=sum(depths) / len(depths))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _generate(llm: EarlyExitLLM, new_tokens: int, choice: dict[str, Any]) -> Any:
    return llm.generate([PROMPT], max_new_tokens=new_tokens, ignore_eos=True, reuse_prefixes=False, **choice)[0]


def transformers_model(folder: Path) -> Callable[[Any, int, str], list[int]]:
    """(tokenizer, new tokens, cache) -> new ids by `generate` of transformers, its attention the default (scaled_dot_product_attention)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids: dict[str, torch.Tensor] = {}

    def generate(tokenizer: Any, new_tokens: int, cache: str) -> list[int]:
        if not ids:
            ids.update(tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False))
        with torch.inference_mode():
            out = model.generate(**ids, do_sample=False, max_new_tokens=new_tokens, cache_implementation=cache,
                                 pad_token_id=model.config.eos_token_id)
        return out[0, ids["input_ids"].shape[1]:].tolist()

    # Without an end of text it never stops early, and needs no logits processor that suppresses it at every step.
    model.generation_config.eos_token_id = None
    return generate


def ideal_speedup(llm: EarlyExitLLM, half: int, new_tokens: int) -> float:
    """(all layers + final head) / (layers 1..half + exit head) in measured seconds: prompt and `new_tokens` - 1 decode steps."""
    prompt = len(llm.tokenizer(PROMPT)["input_ids"])
    engine = Engine(llm.model, llm.stages, num_slots=1, max_length=prompt + new_tokens)
    steps = [(0, prompt), *((prompt + i, 1) for i in range(new_tokens - 1))]
    with torch.inference_mode():
        # One depth after the other, as in a generation: where half of the weights fit into a processor's cache, that is part of the ideal.
        costs = {depth: sum(_bare_step(engine, depth, *step) for step in steps) for depth in (llm.num_layers, half)}
    return costs[llm.num_layers] / costs[half]


def _bare_step(engine: Engine, depth: int, start: int, length: int) -> float:
    """Seconds of layers 1..depth on `length` tokens behind `start` others, and of the head after them on the last one."""
    config, model = engine.config, engine.model
    hidden = torch.ones(length, config.hidden_size, dtype=model.plan.dtype)
    places = engine.cache.places(list(range(engine.cache.pool.num_blocks)))
    batch = ragged_batch([places], [start], [length], *engine.runner.tables,
                         queries_per_group=config.num_attention_heads // config.num_query_groups, num_places=engine.cache.num_places)
    began = time.perf_counter()
    for number in range(1, depth + 1):
        hidden, exit_input = engine.runner.layers[number](hidden, engine.cache.layer(number), batch)
    if depth == config.num_layers:
        logits = F.linear(model.final_hidden(hidden[-1:]), model.backbone.output_layer.weight)
    else:
        assert exit_input.residual is not None
        logits = model.exit_head(depth)(ExitInput(exit_input.hidden[-1:], exit_input.residual[-1:]), F.linear)
    top1(logits, model.vocab).token_ids.item()
    return time.perf_counter() - began


def ideal_by_parameters(llm: EarlyExitLLM, half: int) -> float:
    """The same ratio in parameters, which is the ratio of bytes read per token."""
    layer = sum(p.numel() for p in llm.model.backbone.layer(1).parameters())
    final = llm.model.backbone.output_layer.weight.numel() + llm.model.config.hidden_size
    exit_head = llm.model.exit_head(half)
    own = {id(p): p.numel() for p in [*exit_head.parameters(), exit_head.output_weight]}
    return (llm.num_layers * layer + final) / (half * layer + sum(own.values()))


def _print_tables(results: list[Result]) -> None:
    print("| model | way | tokens/s | after the first token |\n|---|---|---|---|")
    for r in results:
        names = {"full": "full depth", "half": f"fixed at layer {r.half_layer}",
                 "threshold": f"threshold {THRESHOLD}, mean depth {r.threshold_mean_depth:.1f}",
                 **{cache: f"transformers, {cache} cache" for cache in CACHES}}
        for way, words in names.items():
            print(f"| {r.model} ({r.million_parameters:.1f}M) | {words} | {r.rates[way]:.0f} | {r.decode_only_rates[way]:.0f} |")
    print("\n| model | claim | measured | goal | met |\n|---|---|---|---|---|")
    for r in results:
        _print_claim(r.model, f"full depth ÷ transformers ({r.best_cache} cache; after the first token {r.decode_only_ratio:.2f}; "
                     f"same tokens {r.same_tokens:.0%})", r.ratio_to_transformers, GOALS["full ÷ transformers"])
        _print_claim(r.model, f"half depth: speed-up {r.half_speedup:.2f} ÷ ideal {r.ideal_speedup:.2f} by time of layers and heads "
                     f"(by parameters {r.ideal_by_parameters:.2f}, of which {r.half_speedup / r.ideal_by_parameters:.2f})",
                     r.half_to_ideal, GOALS["half depth ÷ ideal"])
        print(f"| {r.model} | threshold {THRESHOLD}: speed-up over full depth | {r.threshold_speedup:.2f} | | |")


def _print_claim(model: str, claim: str, value: float, goal: float) -> None:
    print(f"| {model} | {claim} | {value:.2f} | ≥ {goal} | {'yes' if value >= goal else 'no'} |")


if __name__ == "__main__":
    main()
