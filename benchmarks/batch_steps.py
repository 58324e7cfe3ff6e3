"""The time of a decode step by the number of sequences that decode together, at full depth.

    python benchmarks/batch_steps.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/batch_steps.py --model examples/tiny-python-llama

Speculation plans with the growth of these times (`GROWTH` in engine/cost_model.py). Prompts are arbitrary tokens, the
same number for each sequence; reading them is told apart. The fastest of --repeats generations counts.
"""

import argparse
import time

import torch

from ee_tuning import EarlyExitLLM, SamplingParams
from ee_tuning.engine.engine import Engine
from ee_tuning.sampling.policy import FULL


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 5, 6, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    llm = EarlyExitLLM.load(options.model, dtype="float32")
    torch.set_num_threads(options.threads)
    print("| sequences | ms a step | ÷ one sequence | ms for the prompts |")
    print("|---|---|---|---|")
    alone = None
    for batch in options.batches:
        runs = [_seconds(llm, batch, options) for _ in range(options.repeats)]
        step, prompts = (min(kind) for kind in zip(*runs, strict=True))
        alone = alone or step
        print(f"| {batch} | {step * 1e3:.2f} | {step / alone:.2f} | {prompts * 1e3:.0f} |", flush=True)


def _seconds(llm: EarlyExitLLM, batch: int, options: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds of a decode step, and of the steps that read the prompts."""
    length = options.prompt_tokens + options.new_tokens
    engine = Engine(llm.model, llm.stages, num_slots=batch, max_length=length, reuses_prefixes=False)
    size = llm.model.config.vocab_size
    for row in range(batch):
        prompt = [(31 * i + 7 * row) % size for i in range(options.prompt_tokens)]
        engine.add_request(prompt, SamplingParams(max_tokens=options.new_tokens, ignore_eos=True), FULL)
    began = time.perf_counter()
    while sum(each.num_output > 0 for each in engine.scheduler.running) < batch:
        engine.step()
    read, num_steps = time.perf_counter(), options.new_tokens // 2  # none has ended by then
    for _ in range(num_steps):
        engine.step()
    return (time.perf_counter() - read) / num_steps, read - began


if __name__ == "__main__":
    main()
