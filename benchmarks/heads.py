"""The head architectures on the shipped model: held-out loss per exit before and after tuning, and the size of an exit.

    python benchmarks/heads.py

The shape to expect is EE-Tuning's (arXiv 2402.00518, figures 4 and 6): deeper exits and richer heads lose less, copies
begin far ahead of random weights. One run per row, all on the same text, in one process.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

from ee_tuning.artifact.exit_names import exit_tensor_shapes
from ee_tuning.config import Architecture, Config, load_config
from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.evaluation.quality import final_head_loss
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import read_model_config
from ee_tuning.tuning.command import tune

MODEL = Path(__file__).parents[1] / "examples" / "tiny-python-llama"
EXIT_LAYERS, ADAPTER_RANK, TRAINING_BYTES = (3, 6, 9), 64, 3_000_000


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=200, help="optimizer steps of 8 × 256 tokens (default %(default)s)"
    )
    parser.add_argument("--init", nargs="+", default=["copy", "random"], choices=("copy", "random"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        texts = write_texts(Path(name))
        for init in options.init:
            for architecture in get_args(Architecture):
                config = job(Path(name) / f"{architecture}-{init}", texts, architecture, init, options.steps)
                tune(config)
                rows.append((architecture, init, *losses(config)))
        llm = EarlyExitLLM.load(str(MODEL))
        final = final_head_loss(llm, config)
    layers = [str(layer) for layer in EXIT_LAYERS]
    print(
        f"\n{options.steps} steps of 8 × 256 tokens, untied, adapters of rank {ADAPTER_RANK}; the model's own loss {final:.3f}\n"
    )
    columns = [
        "head",
        "init",
        "parameters of an exit, output matrix apart",
        *(f"layer {layer}: before → after" for layer in layers),
    ]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for architecture, init, before, after in rows:
        told = " | ".join(f"{before[layer]:.2f} → {after[layer]:.3f}" for layer in layers)
        print(f"| `{architecture}` | {init} | {num_parameters(architecture):,} | {told} |")


def write_texts(folder: Path) -> dict[str, list[str]]:
    """Writes Python's own library as texts, like the demo."""
    training, held_out = sample_corpus()
    size, chosen = 0, []
    for name in sorted(training, key=lambda n: n[::-1]):
        if (size := size + len(training[name])) > TRAINING_BYTES:
            break
        chosen.append(training[name])
    for file, texts in (("train", chosen), ("valid", [text for _, text in sorted(held_out.items())])):
        (folder / f"{file}.jsonl").write_text(
            "".join(json.dumps({"text": text.decode(errors="replace")}) + "\n" for text in texts)
        )
    return {"data.paths": [str(folder / "train.jsonl")], "data.valid_paths": [str(folder / "valid.jsonl")]}


def job(run: Path, texts: dict[str, list[str]], architecture: str, init: str, steps: int) -> Config:
    """Returns the job of one row."""
    keys: dict[str, Any] = {
        "model.path": str(MODEL),
        "exits.exit_layers": list(EXIT_LAYERS),
        "exits.architecture": architecture,
        "exits.init": init,
        "exits.adapter_rank": ADAPTER_RANK,
        **texts,
        "tuning.run_folder": str(run),
        "tuning.train_iters": steps,
        "tuning.micro_batch_size": 4,
        "tuning.global_batch_size": 8,
        "tuning.seq_length": 256,
        "tuning.lr": 3e-3,
        "tuning.min_lr": 3e-4,
        "tuning.eval_interval": steps,
        "tuning.eval_iters": 16,
        "tuning.save_interval": 0,
    }
    return load_config(None, keys)


def losses(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the held-out loss by exit layer, before and after."""
    lines = (Path(config.tuning.run_folder) / "metrics.jsonl").read_text().splitlines()
    held_out = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "validation"]
    return held_out[0], held_out[-1]


def num_parameters(architecture: Architecture) -> int:
    """Returns the parameters of an exit that ties its output matrix."""
    spec = ExitSpec(layer=1, architecture=architecture, ties_output=True, adapter_rank=ADAPTER_RANK)
    sizes = exit_tensor_shapes((spec,), read_model_config(MODEL)).values()
    return sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes)


if __name__ == "__main__":
    main()
