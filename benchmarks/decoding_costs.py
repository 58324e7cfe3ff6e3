"""The costs of a token that leaves at an exit, of asking an exit in vain, of catching up and of a round of drafts:
measured, and predicted from the bytes read.

    python benchmarks/decoding_costs.py --model SmolLM2-135M-Instruct --exits runs/smol/exit_heads --exit-layer 22

All costs are shares of a token at full depth in the same run. The prediction from bytes: each way reads the weights of
the layers and heads that it runs, and costs in proportion. Whole generations are measured, without the prompt.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from real_time import set_real_time

from ee_tuning import EarlyExitLLM
from ee_tuning.engine.cost_model import expected_costs
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.speculation import Speculation
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

PROMPT = "Once upon a time there was a"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--exits", required=True)
    parser.add_argument("--exit-layer", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafts", type=int, default=4, help="of a round (default %(default)s)")
    parser.add_argument(
        "--real-time", action="store_true", help="keep all else off the cores while it decodes (needs root)"
    )
    options = parser.parse_args()
    llm = EarlyExitLLM.load(options.model, options.exits, dtype=options.dtype)
    ways = _ways(llm, options)
    seconds: dict[str, list[float]] = {name: [] for name, *_ in ways}
    for _ in range(options.rounds + 1):
        for name, _, run in ways:
            set_real_time(options.real_time)
            seconds[name].append(run())
            set_real_time(False)
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    full = medians[ways[0][0]]
    print(
        f"\n{options.model}, {options.dtype}, exits after {llm.exit_layers}, {torch.get_num_threads()} threads; full depth "
        f"{1e3 * full:.1f} ms a token\n\n| what | told from bytes | measured |\n|---|---|---|"
    )
    for name, told, _ in ways:
        print(f"| {name} | {told:.2f} | {medians[name] / full:.2f} |")


def _ways(llm: EarlyExitLLM, options: argparse.Namespace) -> list[tuple[str, float, Callable[[], float]]]:
    """Returns (name, share of full depth by bytes, seconds) of each way."""
    layer, exits = options.exit_layer, llm.exit_layers
    engine = Engine(llm.model, llm.stages, num_slots=1, max_length=256)
    ids = llm.encode(PROMPT)

    def per_token(policy: Policy) -> Callable[[], float]:
        def run() -> float:
            engine.add_request(ids, SamplingParams(max_tokens=options.new_tokens, ignore_eos=True), policy)
            engine.step()
            began, count = time.perf_counter(), 0
            while not engine.is_idle:
                count += len(engine.step())
            return (time.perf_counter() - began) / count

        return run

    def one_round() -> float:
        engine.add_request(ids, SamplingParams(max_tokens=60, ignore_eos=True), Policy(drafts_at=(layer,)))
        engine.step()
        engine.proposer.speculation = AlwaysDrafts(engine, layer, options.drafts)
        began, num_rounds = time.perf_counter(), 4
        for _ in range(num_rounds):
            engine.step()
        took = (time.perf_counter() - began) / num_rounds
        engine.clear()
        return took

    head, final, layers = _bytes(llm)
    whole = llm.num_layers * layers + final
    deep = (llm.num_layers - layer) * layers
    return [
        ("full depth", 1.0, per_token(FULL)),
        (
            f"a token that leaves at {layer} and never goes deeper (fixed)",
            (layer * layers + head[layer]) / whole,
            per_token(Policy(fixed_exit=layer)),
        ),
        (
            f"… that goes deeper later, sixteen at a time (threshold 0 at {layer})",
            (layer * layers + head[layer] + deep / 16) / whole,
            per_token(Policy(thresholds={layer: 0.0})),
        ),
        (f"full depth, asked in vain at {layer}", 1 + head[layer] / whole, per_token(Policy(thresholds={layer: 2.0}))),
        (
            f"full depth, asked in vain at all {len(exits)} exits",
            1 + sum(head.values()) / whole,
            per_token(Policy(thresholds=dict.fromkeys(exits, 2.0))),
        ),
        (
            f"a round of {options.drafts} drafts at {layer} and their check",
            ((options.drafts + 1) * layer * layers + options.drafts * head[layer] + deep + final) / whole,
            one_round,
        ),
    ]


class AlwaysDrafts(Speculation):
    """Drafts a fixed number of tokens by one exit in every round."""

    def __init__(self, engine: Engine, layer: int, count: int):
        super().__init__(expected_costs(engine.stage), engine.segments)
        self._layer, self._count = layer, count

    def begin_round(self, sequence: Sequence, num_rows: int, most: int) -> None:
        """See Speculation."""
        sequence.drafts.begin({self._layer: 0.0}, self._count, num_rows)


def _bytes(llm: EarlyExitLLM) -> tuple[dict[int, int], int, int]:
    """Returns the numbers read by each exit's head, by the final head, and by a layer."""
    model = llm.model
    heads = {
        layer: sum(p.numel() for p in head.parameters())
        + (0 if any(p is head.output_weight for p in head.parameters()) else head.output_weight.numel())
        for layer in llm.exit_layers
        for head in [model.exit_head(layer)]
    }
    in_layers = sum(
        p.numel() for name, p in model.backbone.named_parameters() if ".layers." in name or name.startswith("layers.")
    )
    return heads, model.backbone.output_layer.weight.numel(), in_layers // llm.num_layers


if __name__ == "__main__":
    main()
