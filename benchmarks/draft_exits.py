"""Tunes an exit of the shipped model that drafts well for speculation: a `layer` head low in the network, distilled,
then on the model's own words.

    python benchmarks/draft_exits.py --output runs/drafts

A draft is right where the exit predicts the full model's token *after the full model's own text*. So its training ends
with such text: greedy continuations of pieces of the training text. OUTPUT/exit_heads is the artifact that
benchmarks/speculation.py measures.
"""

import argparse
import json
import random
from pathlib import Path

from heads import write_texts
from random_model import SHIPPED_MODEL

from ee_tuning import EarlyExitLLM
from ee_tuning.config import load_config
from ee_tuning.tuning.command import tune

OWN_TOKENS, BATCH = 300, 48
"""New tokens of a continuation; number of continuations made at a time."""


def main() -> None:
    """Tunes twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for texts, runs and exit_heads")
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=800, help="on the library (default %(default)s)")
    parser.add_argument(
        "--own-texts", type=int, default=3840, help="continuations by the model itself (default %(default)s)"
    )
    parser.add_argument("--own-steps", type=int, default=2000, help="on them (default %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    texts = write_texts(options.output)
    exits: dict[str, object] = {"exits.exit_layers": options.exit_layers, "exits.architecture": "layer"}
    _tune(options.output / "library", {**texts, **exits, "tuning.lr": 3e-3, "tuning.min_lr": 3e-4}, options.steps)
    own = options.output / "own.jsonl"
    _write_own_texts(own, Path(texts["data.paths"][0]), options.own_texts)
    _tune(
        options.output / "own",
        {
            **texts,
            "data.paths": [str(own)],
            "exits.path": str(options.output / "library" / "exit_heads"),
            "tuning.lr": 3e-3,
            "tuning.min_lr": 1e-4,
        },
        options.own_steps,
    )
    target = options.output / "exit_heads"
    if not target.exists():
        target.symlink_to(Path("own", "exit_heads"))
    print(f"exits in {target}; next: python benchmarks/speculation.py --exits {target}")


def _tune(run: Path, keys: dict[str, object], steps: int) -> None:
    tune(
        load_config(
            None,
            {
                "model.path": str(SHIPPED_MODEL),
                "tuning.run_folder": str(run),
                "tuning.train_iters": steps,
                "tuning.loss": "forward_kl",
                "tuning.micro_batch_size": 4,
                "tuning.global_batch_size": 4,
                "tuning.seq_length": 512,
                "tuning.eval_interval": steps,
                "tuning.compare_final": True,
                "tuning.save_interval": 0,
                **keys,
            },
        )
    )


def _write_own_texts(path: Path, source: Path, count: int) -> None:
    """Writes pieces of the training text, each with the full model's continuation."""
    llm, draw = EarlyExitLLM.load(SHIPPED_MODEL), random.Random(0)
    texts = [
        text
        for text in (json.loads(line)["text"] for line in source.read_text().splitlines())
        if len(text) > 400 and text.isascii()
    ]
    with path.open("w") as file:
        for first in range(0, count, BATCH):
            prompts = []
            for text in draw.choices(texts, [len(text) for text in texts], k=min(BATCH, count - first)):
                at = draw.randrange(len(text) - 300)
                prompts.append(text[at : at + draw.choice((80, 150, 300))])
            said = llm.generate(
                prompts, policy="full", max_new_tokens=OWN_TOKENS, ignore_eos=True, max_batch_size=BATCH
            )
            file.writelines(json.dumps({"text": completion.prompt + completion.text}) + "\n" for completion in said)
            print(f"{first + len(prompts)} of {count} texts of the model's own", flush=True)


if __name__ == "__main__":
    main()
