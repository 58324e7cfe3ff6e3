"""Exits fitted by least squares, compared with copied ones: before any training, and after the same training.

    python benchmarks/fitting.py  # the shipped model, on the standard library's sources
    python benchmarks/fitting.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text docstrings --length 512
        --layers 4,8,12,15,18,22,26

For each exit, on held-out text: loss in nats a token, share of tokens on which it agrees with the full model's
likeliest one, share of tokens of confidence 0.8 and more, and how many of these are the full model's; and all that
after --steps optimizer steps, which both kinds of exits take with the same texts and settings. Copied exits are then
`linear`, so that they have as many parameters.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.artifact.shapes import with_seq_length
from ee_tuning.config import Config, load_config, replace
from ee_tuning.data.loader import validation_batches
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.data.splits import load_samples
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import convert_by_texts, tune_within

SHIPPED = Path(__file__).parents[1] / "examples" / "tiny-python-llama"
SURE = 0.8


@dataclasses.dataclass
class Figures:
    """Sums over tokens, of one exit."""

    loss: float = 0.0
    agrees: int = 0
    sure: int = 0
    sure_and_agrees: int = 0

    def add(self, logits: Tensor, labels: Tensor, top: Tensor) -> None:  # [n, v], [n], [n]
        """Adds tokens."""
        confidence, said = logits.float().softmax(-1).max(-1)
        self.loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        self.agrees += int((said == top).sum())
        self.sure += int((confidence >= SURE).sum())
        self.sure_and_agrees += int(((confidence >= SURE) & (said == top)).sum())

    def row(self, count: int) -> str:
        """Returns the cells of the table."""
        right = f"{self.sure_and_agrees / self.sure:.3f}" if self.sure else "    –"
        return f"{self.loss / count:7.3f} {self.agrees / count:9.3f} {self.sure / count:6.3f} {right:>6}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED))
    parser.add_argument("--layers", default="3,6,9")
    parser.add_argument(
        "--text",
        choices=("sources", "docstrings"),
        default="sources",
        help="of Python's standard library; held out are some files, or every fifth docstring",
    )
    parser.add_argument("--train", metavar="FILE", help="texts of your own, with --held-out FILE")
    parser.add_argument("--held-out", metavar="FILE")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument(
        "--fit-tokens", type=int, nargs="*", default=[0], help="a table for each; 0: as many as tune takes"
    )
    parser.add_argument("--held-out-tokens", type=int, default=10_000)
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = _job(args, Path(folder))
        for tokens in args.fit_tokens:
            began, fitted = time.perf_counter(), Path(folder) / f"fitted-{tokens}"
            convert_by_texts(replace(config, exits={"init": "fitted"}, tuning={"fit_tokens": tokens}), fitted)
            print(
                f"fitted on {json.loads((fitted / 'exit_config.json').read_text())['fitted']['tokens']:,} tokens, "
                f"{time.perf_counter() - began:.0f} s with loading",
                flush=True,
            )
            _print_table(config, {"fitted": fitted}, has_copied=True)
        _tune_and_print(config, Path(folder), fitted, args.steps)


def _job(args: argparse.Namespace, folder: Path) -> Config:
    held_out_rows = max(1, args.held_out_tokens // args.length)
    config = load_config(
        None,
        {
            "model.path": args.model,
            "exits.exit_layers": args.layers,
            "exits.architecture": "norm",
            "exits.output": "tied",
            "tuning.seq_length": args.length,
            "tuning.micro_batch_size": args.batch,
            "tuning.global_batch_size": args.batch,
            "tuning.lr": args.lr,
            "tuning.eval_iters": -(-held_out_rows // args.batch),
            "tuning.eval_interval": 0,
            "tuning.save_interval": 0,
        },
    )
    if args.train:
        return with_seq_length(replace(config, data={"paths": (args.train,), "valid_paths": (args.held_out,)}))
    train, held_out = ([source.decode(errors="replace") for source in files.values()] for files in sample_corpus())
    if args.text == "docstrings":
        texts = list(
            documentation_strings({name: source for files in sample_corpus() for name, source in files.items()})
        )
        train, held_out = [text for index, text in enumerate(texts) if index % 5], texts[::5]
    for name, texts in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    paths = {"paths": (str(folder / "train.jsonl"),), "valid_paths": (str(folder / "held_out.jsonl"),)}
    return with_seq_length(replace(config, data=paths))


def _tune_and_print(config: Config, folder: Path, fitted: Path, steps: list[int]) -> None:
    copied = folder / "copied"
    if steps:
        write_initial_exits(
            replace(config, exits={"architecture": ("linear",)}), copied, init_parallel(config.parallel)
        )
    for count in steps:
        print(
            f"after {count} steps of {config.tuning.global_batch_size * config.tuning.seq_length:,} tokens", flush=True
        )
        for name, exits in (("copied", copied), ("fitted", fitted)):
            run = folder / f"{name}-{count}"
            tune_within(
                replace(
                    config,
                    exits={"path": str(exits)},
                    tuning={"run_folder": str(run), "train_iters": count, "eval_iters": 0, "log_interval": count},
                ),
                init_parallel(config.parallel),
            )
            _print_table(config, {name: run / "exit_heads"}, has_copied=False)


@torch.inference_mode()
def _print_table(config: Config, artifacts: dict[str, Path], *, has_copied: bool) -> None:
    """Prints the table. `has_copied`: the exits are untuned, so the figures of exits without maps are printed, too."""
    kinds: dict[str, dict[int, Figures]] = {}
    for name, path in artifacts.items():
        model = load_for_generation(replace(config, exits={"path": str(path)}), init_parallel(config.parallel)).model
        measured, own, count = _measure(model, config, has_copied)
        kinds |= {name: measured["whole"], **({"copied": measured["bare"]} if has_copied else {})}
    print(f"{count:,} held-out tokens; the model's own loss {own / count:.3f}")
    print(
        "layer  "
        + "  ".join(f"{name + ': loss':>14} {'agrees':>7} {'>=0.8':>6} {'right':>6}" for name in sorted(kinds))
    )
    for layer in next(iter(kinds.values())):
        print(f"{layer:5d}  " + "  ".join(kinds[name][layer].row(count) for name in sorted(kinds)), flush=True)


def _measure(model: EarlyExitModel, config: Config, has_bare: bool) -> tuple[dict[str, dict[int, Figures]], float, int]:
    splits = load_samples(
        config.data,
        config.model.path,
        seq_length=config.tuning.seq_length,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    )
    layers, own, count = model.plan.exit_layers, 0.0, 0
    found = {kind: {layer: Figures() for layer in layers} for kind in ("whole", "bare")}
    for batch in validation_batches(splits.valid, config.tuning, dp=1, dp_rank=0):
        documents = PackedDocuments.of(batch.document_ids, batch.position_ids, model.topology.device)
        hidden, inputs = model.run_layers(model.embed(batch.tokens, documents), documents)
        keep = batch.loss_mask.flatten() > 0
        labels, weight = batch.labels.flatten()[keep], model.backbone.output_layer.weight
        logits = F.linear(model.final_hidden(hidden), weight).flatten(0, 1)[keep]
        top, own, count = (
            logits.argmax(-1),
            own + F.cross_entropy(logits.float(), labels, reduction="sum").item(),
            count + len(labels),
        )
        for layer in layers:
            head = model.exit_head(layer)
            found["whole"][layer].add(head(inputs[layer], F.linear).flatten(0, 1)[keep], labels, top)
            if has_bare:
                bare = F.linear(head.own_hidden(inputs[layer]), head.output_weight)
                found["bare"][layer].add(bare.flatten(0, 1)[keep], labels, top)
    return found, own, count


if __name__ == "__main__":
    main()
