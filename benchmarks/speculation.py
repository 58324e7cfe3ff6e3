"""Speculative decoding on the shipped model: the same tokens as full depth, how much faster, and beside transformers'
own.

    python benchmarks/draft_exits.py --output runs/drafts
    python benchmarks/speculation.py --exits runs/drafts/exit_heads

Every held-out prompt is decoded at full depth and by speculation before the next one. A few are decoded by transformers
too: plainly, and with `assistant_early_exit` at each of several layers, of which the best counts. That drafts with the
first layers under the model's own last norm and output matrix, and can use no tuned head.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decoding_theirs import Theirs
from held_out import held_out_prompts
from random_model import SHIPPED_MODEL

from ee_tuning import EarlyExitLLM

PROMPT_BYTES = 200
THEIR_LAYERS = (3, 6, 9, 11)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exits", type=Path, required=True, help="tuned exit heads of the shipped model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--their-prompts", type=int, default=4, help="of them, decoded by transformers too (default %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = measure(
        options.exits, held_out_prompts(options.prompts, PROMPT_BYTES), options.their_prompts, options.new_tokens
    )
    print(
        f"\n{options.new_tokens} new tokens after each of {options.prompts} held-out prompts of {PROMPT_BYTES} bytes, float32, batch 1, "
        f"{options.threads} thread(s)\n"
    )
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def measure(exits: Path, prompts: list[str], num_theirs: int, new_tokens: int) -> dict[str, Any]:
    """Returns all figures; rates are in tokens per second."""
    llm, theirs = EarlyExitLLM.load(SHIPPED_MODEL, exits), Theirs(SHIPPED_MODEL)
    keys: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True, "reuse_prefixes": False}
    seconds: dict[str, list[float]] = {}
    first_token: dict[str, list[float]] = {}
    same = drafted = accepted = 0

    def timed(way: str, call: Any, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments, **options)
        seconds.setdefault(way, []).append(time.perf_counter() - began)
        return result

    for policy in ("full", "speculative"):  # a process's first passes pay for allocations, and measure costs
        llm.generate(prompts[:1], policy=policy, **keys)
    theirs.generate([llm.encode(prompts[0])], "dynamic", 8)
    for index, prompt in enumerate(prompts):
        if index % 20 == 0:
            print(f"prompt {index + 1} of {len(prompts)}", file=sys.stderr, flush=True)
        said = {}
        for policy in ("full", "speculative"):
            (said[policy],) = timed(policy, llm.generate, [prompt], policy=policy, **keys)
            first_token.setdefault(policy, []).append(said[policy].statistics.seconds_to_first_token)
        same += said["full"].token_ids == said["speculative"].token_ids
        drafted += said["speculative"].statistics.num_drafted
        accepted += said["speculative"].statistics.num_accepted
        if index < num_theirs:
            ids = [llm.encode(prompt)]
            timed("transformers", theirs.generate, ids, "dynamic", new_tokens)
            for layer in THEIR_LAYERS:
                timed(f"early exit {layer}", theirs.exit_early, ids, new_tokens, layer)
    return _figures(
        seconds,
        num_theirs,
        new_tokens,
        {
            "prompts": len(prompts),
            "same": same,
            "drafted": drafted,
            "accepted": accepted,
            "exits": list(llm.exit_layers),
            "behind_first": _behind_first(seconds, first_token),
        },
    )


def _behind_first(seconds: dict[str, list[float]], first_token: dict[str, list[float]]) -> float:
    """Returns the speed-up without the time until the first token, which speculation can not change."""
    full, speculative = (sum(seconds[policy]) - sum(first_token[policy]) for policy in ("full", "speculative"))
    return full / speculative


def _figures(
    seconds: dict[str, list[float]], num_theirs: int, new_tokens: int, counts: dict[str, Any]
) -> dict[str, Any]:
    best = min(THEIR_LAYERS, key=lambda layer: sum(seconds[f"early exit {layer}"])) if num_theirs else None
    return {
        **counts,
        "rates": {way: new_tokens * len(s) / sum(s) for way, s in seconds.items()},
        "speed_up": sum(seconds["full"]) / sum(seconds["speculative"]),
        "median_speed_up": statistics.median(
            f / s for f, s in zip(seconds["full"], seconds["speculative"], strict=True)
        ),
        "their_best_layer": best,
        "to_theirs": best and sum(seconds[f"early exit {best}"]) / sum(seconds["speculative"][:num_theirs]),
        "their_speed_up": best and sum(seconds["transformers"]) / sum(seconds[f"early exit {best}"]),
    }


def _print(figures: dict[str, Any]) -> None:
    print("| way | tokens/s |\n|---|---|")
    for way, rate in figures["rates"].items():
        print(f"| {way} | {rate:.0f} |")
    drafts = f"exits {figures['exits']}, {figures['accepted'] / max(figures['drafted'], 1):.0%} of {figures['drafted']} drafts right"
    claims = [
        (f"prompts with the very tokens of full depth, of {figures['prompts']}", figures["same"], figures["prompts"]),
        (
            f"speculative ÷ full depth ({drafts}; median of prompts {figures['median_speed_up']:.2f}; behind the first token "
            f"{figures['behind_first']:.2f})",
            figures["speed_up"],
            1.3,
        ),
    ]
    if figures["their_best_layer"]:
        claims.append(
            (
                f"speculative ÷ transformers' assistant_early_exit at {figures['their_best_layer']}, its best (its own speed-up: "
                f"{figures['their_speed_up']:.2f})",
                figures["to_theirs"],
                1.0,
            )
        )
    print("\n| claim | measured | goal | met |\n|---|---|---|---|")
    for words, value, goal in claims:
        print(f"| {words} | {value:.4g} | ≥ {goal} | {'yes' if value >= goal else 'no'} |")


if __name__ == "__main__":
    main()
