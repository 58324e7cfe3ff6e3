"""Time and peak memory of the chunked loss against the plain one that materializes all logits, in one run.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --vocab-sizes 32000 --tokens 2048 --chunk-tokens 256

Each figure comes from a process of its own: peak memory is how far its resident set (ru_maxrss) rises over what it held
with inputs and room for both gradients already there, so it counts logits, their gradients and other temporaries alone.
Time is the best of a few forward and backward passes. Prints a Markdown table.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.losses.loss import linear_loss
from ee_tuning.parallel.vocab import VocabShard

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measures every vocabulary with both losses and prints the table; with --one, one of them, as JSON."""
    options = _options()
    if options.one:
        print(json.dumps(_measure(options.one, options.vocab_sizes[0], options)))
        return
    print(
        f"{options.tokens} tokens, hidden {options.hidden_size}, {options.dtype}, chunks of {options.chunk_tokens} tokens, "
        f"{options.threads} thread(s)\n"
    )
    print(
        "| vocabulary | plain time | chunked time | ratio | all logits | plain memory | one chunk of logits | chunked memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for vocab_size in options.vocab_sizes:
        plain, chunked = (_in_a_process(name, vocab_size) for name in ("plain", "chunked"))
        row = vocab_size * DTYPES[options.dtype].itemsize / MIB
        print(
            f"| {vocab_size} | {plain['seconds']:.2f} s | {chunked['seconds']:.2f} s | {chunked['seconds'] / plain['seconds']:.2f} | "
            f"{row * options.tokens:.0f} MiB | {plain['mebibytes']:.0f} MiB | "
            f"{row * options.chunk_tokens:.0f} MiB | {chunked['mebibytes']:.0f} MiB |",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32000, 128000])
    parser.add_argument("--tokens", type=int, default=1024, help="sequence × micro-batch")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=128, help="tokens whose logits exist at one time")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=["plain", "chunked"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(name: str, vocab_size: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--vocab-sizes", str(vocab_size), "--one", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(name: str, vocab_size: int, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    hidden = torch.randn(options.tokens, 1, options.hidden_size, dtype=dtype).requires_grad_()
    weight = torch.empty(vocab_size, options.hidden_size, dtype=dtype).normal_(std=0.02).requires_grad_()
    labels, mask = torch.randint(vocab_size, (options.tokens, 1)), torch.ones(options.tokens, 1)
    vocab = VocabShard(vocab_size, 0, vocab_size, None, 1)

    def step() -> Tensor:
        if name == "plain":
            losses = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), reduction="none")
            return (losses * mask.flatten()).sum()
        return linear_loss(hidden, weight, labels, mask, vocab=vocab, chunk_tokens=options.chunk_tokens).loss

    _warm_up(hidden, weight, labels)
    gradients = hidden.numel() * dtype.itemsize + weight.numel() * (4 if name == "chunked" else dtype.itemsize)
    held = _peak_bytes()
    best = float("inf")
    for _ in range(options.repeats):
        hidden.grad = weight.grad = None
        began = time.perf_counter()
        step().backward()
        best = min(best, time.perf_counter() - began)
    return {"seconds": best, "mebibytes": (_peak_bytes() - held - gradients) / MIB}


def _warm_up(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Loads the libraries' kernels, so that their pages do not count as the loss's."""
    few = 16
    small = weight[:few].detach().requires_grad_()
    F.cross_entropy(F.linear(hidden[:few, 0], small).float(), labels[:few, 0] % few).backward()
    linear_loss(
        hidden[:few],
        small,
        labels[:few] % few,
        torch.ones(few, 1),
        vocab=VocabShard(few, 0, few, None, 1),
        chunk_tokens=few,
    ).loss.backward()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
