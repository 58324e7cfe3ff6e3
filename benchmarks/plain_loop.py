"""A tuning step against a plain loop in transformers: tokens per second, and peak memory.

    python benchmarks/plain_loop.py
    python benchmarks/plain_loop.py --vocab-sizes 32000 --steps 5 --json plain_loop.json

The plain loop is the obvious one: the frozen transformers model, called under no_grad; the same `mlp` heads as modules
on its hidden states; logits made whole, cross-entropy, and autograd. Ours is a step of the tuner. Both train the same
exits of the same random model on batches of the same shape, in float32. Each runs in a process of its own, in turn;
peak memory is what the process holds at its worst moment beyond the imported libraries.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXITS = (2, 4)
SHAPE = {
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
FASTER, SMALLER = 1.3, 0.6


@dataclass(frozen=True)
class Figures:
    """Figures of one way, in one process."""

    seconds: float
    """Median seconds of a step."""
    peak: int
    """Peak memory in bytes."""


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32000, 128000])
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    rows = []
    for vocab_size in options.vocab_sizes:
        with tempfile.TemporaryDirectory() as folder:
            _in_process(_write_model, Path(folder), vocab_size)
            taken: dict[str, list[Figures]] = {"plain": [], "ours": []}
            for _ in range(options.rounds):
                for name, way in (("plain", plain), ("ours", ours)):
                    taken[name].append(_in_process(way, Path(folder), options))
        rows.append(
            {
                "vocab_size": vocab_size,
                **{
                    name: {
                        "seconds": statistics.median(each.seconds for each in own),
                        "peak": max(each.peak for each in own),
                    }
                    for name, own in taken.items()
                },
            }
        )
    _print_table(rows, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def plain(folder: Path, options: argparse.Namespace) -> Figures:
    """Runs the plain loop."""
    import torch
    import torch.nn.functional as F
    import transformers

    torch.set_num_threads(options.threads)
    before = _resident()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).requires_grad_(False)
    caught: dict[int, Any] = {}
    heads: dict[int, Any] = {}
    for layer in EXITS:
        block = model.model.layers[layer - 1]
        heads[layer] = torch.nn.ModuleDict(
            {
                "mlp": copy.deepcopy(block.mlp),
                "norm": copy.deepcopy(model.model.norm),
                "output": copy.deepcopy(model.lm_head),
            }
        ).requires_grad_(True)
        block.post_attention_layernorm.register_forward_hook(
            lambda norm, inputs, out, layer=layer: caught.update({layer: (inputs[0], out)})
        )  # type: ignore[misc]
    optimizers = {
        layer: torch.optim.AdamW(head.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
        for layer, head in heads.items()
    }

    def step() -> None:
        tokens = torch.randint(0, model.config.vocab_size, (options.micro_batch_size, options.seq_length + 1))
        with torch.no_grad():
            model(tokens[:, :-1])
        losses = []
        for layer, head in heads.items():
            residual, normed = caught[layer]
            logits = head["output"](head["norm"](residual + head["mlp"](normed)))
            losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        torch.stack(losses).sum().backward()
        for layer, optimizer in optimizers.items():
            torch.nn.utils.clip_grad_norm_(heads[layer].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return _timed(step, options.steps, before)


def ours(folder: Path, options: argparse.Namespace) -> Figures:
    """Runs steps of the tuner: its work on a micro-batch, and the update."""
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    from ee_tuning.artifact.load import load_for_tuning
    from ee_tuning.config import load_config
    from ee_tuning.data.tokens import PackedSamples, Splits
    from ee_tuning.parallel.relay import Relay
    from ee_tuning.parallel.topology import init_parallel
    from ee_tuning.tuning.stage_forward import StageForward
    from ee_tuning.tuning.tuner import Tuner

    config = load_config(
        None,
        {
            "model.path": str(folder),
            "exits.exit_layers": list(EXITS),
            "tuning.micro_batch_size": options.micro_batch_size,
            "tuning.global_batch_size": options.micro_batch_size,
            "tuning.seq_length": options.seq_length,
            "tuning.eval_iters": 0,
            "tuning.save_interval": 0,
            "tuning.run_folder": str(folder / "run"),
        },
    )
    topology = init_parallel(config.parallel)
    before = _resident()
    loaded = load_for_tuning(config, topology)
    stream = (
        np.random.default_rng(0)
        .integers(0, loaded.model.config.vocab_size, 64 * options.seq_length + 1)
        .astype(np.int32)
    )
    tuner = Tuner(loaded, Splits(train=PackedSamples(stream, options.seq_length), valid=None), config, topology)
    shape = (options.seq_length, options.micro_batch_size, loaded.model.config.hidden_size)
    stage_forward = StageForward(loaded.model, Relay(topology, shape, loaded.model.plan.dtype), topology)
    return _timed(lambda: tuner.dry_step(stage_forward), options.steps, before)


def _timed(step: Callable[[], None], steps: int, before: int) -> Figures:
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: loading is not compared
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return Figures(statistics.median(seconds), _status("VmHWM") - before)


def _write_model(folder: Path, vocab_size: int) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, vocab_size=vocab_size, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _resident() -> int:
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    tokens = options.micro_batch_size * options.seq_length
    print(
        f"\n{tokens} tokens a step, hidden size {SHAPE['hidden_size']}, `mlp` exits after {', '.join(map(str, EXITS))} of "
        f"{SHAPE['num_hidden_layers']} layers, float32, {options.threads} thread(s)\n"
    )
    print(
        "| vocabulary | plain loop | ours | tokens/s ratio | goal | plain memory | our memory | memory ratio | goal |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        one, two = row["plain"], row["ours"]
        print(
            f"| {row['vocab_size']} | {tokens / one['seconds']:.0f} tokens/s | {tokens / two['seconds']:.0f} tokens/s | "
            f"{one['seconds'] / two['seconds']:.2f} | ≥ {FASTER} | {one['peak'] / 2**20:.0f} MiB | {two['peak'] / 2**20:.0f} MiB | "
            f"{two['peak'] / one['peak']:.2f} | ≤ {SMALLER} |"
        )


if __name__ == "__main__":
    main()
