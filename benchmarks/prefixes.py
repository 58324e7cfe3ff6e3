"""The gain where prompts share the keys and values of a common beginning: time to the first token, and the cost of the
sharing for later ones.

    python benchmarks/random_model.py --output /tmp/llama-30m
    python benchmarks/prefixes.py --model /tmp/llama-30m/model --exits /tmp/llama-30m/exit_heads

Full depth, random tokens. Prints the table of docs/benchmarks.md.
"""

import argparse
import time
from pathlib import Path

import torch

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams

NEW_TOKENS, OWN_TOKENS, ROUNDS = 32, 16, 5


def main() -> None:
    """Prints a row for each length of the common beginning and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exits", type=Path, required=True)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 512, 896], help="tokens of the common beginning"
    )
    options = parser.parse_args()
    config = load_config(None, {"model.path": str(options.model), "exits.path": str(options.exits)})
    loaded = load_for_generation(config, init_parallel(ParallelSection()))
    print(
        "| common tokens | requests | first token without, ms | with, ms | tokens/s after it without | with |\n|---|---|---|---|---|---|"
    )
    for length in options.lengths:
        for count in (1, 8):
            without: list[tuple[float, float]] = []
            shared: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                for reuses, results in ((False, without), (True, shared)):
                    engine = Engine(
                        loaded.model,
                        loaded.stages,
                        num_slots=count,
                        max_length=length + OWN_TOKENS + NEW_TOKENS,
                        reuses_prefixes=reuses,
                    )
                    _decode(engine, length, 1, seed=0)  # computes the beginning; without reuse, a pass to warm up
                    results.append(_decode(engine, length, count, seed=1))
            # The best of the rounds: other work of the machine only slows a round down.
            first, first_shared = (1e3 * min(each)[0] for each in (without, shared))
            rate, rate_shared = (max(rate for _, rate in each) for each in (without, shared))
            print(
                f"| {length} | {count} | {first:.0f} | {first_shared:.0f} | {rate:.0f} | {rate_shared:.0f} |",
                flush=True,
            )


def _decode(engine: Engine, length: int, count: int, seed: int) -> tuple[float, float]:
    """Returns (seconds until all have their first token, tokens per second of all together from then on)."""
    generator = torch.Generator().manual_seed(seed)
    size = engine.config.vocab_size - 1
    stem = [(7 * i) % size for i in range(length)]
    prompts = [stem + torch.randint(size, (OWN_TOKENS,), generator=generator).tolist() for _ in range(count)]
    began = time.perf_counter()
    sequences = [
        engine.add_request(prompt, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))[0] for prompt in prompts
    ]
    while not all(s.num_output for s in sequences):
        engine.step()
    first, said = time.perf_counter(), sum(s.num_output for s in sequences)
    while not engine.is_idle:
        engine.step()
    return first - began, (sum(s.num_output for s in sequences) - said) / (time.perf_counter() - first)


if __name__ == "__main__":
    main()
