"""Peak disk and memory of tuning an EAGLE-3 head, next to what the hidden states would take if they were written.

    python benchmarks/eagle3_footprint.py
    python benchmarks/eagle3_footprint.py --model SmolLM2-135M-Instruct --data texts.jsonl --output-vocab 8192

`ee-tuning tune --architecture eagle3` runs as a process of its own, with its run folder, its token cache and its
temporary files in one folder, whose size is read five times a second. A trainer that computes the states beforehand
stores, of each token, those of the three layers that the head reads and the last one for the teacher, in the model's
dtype: 4 · hidden size · bytes of a number.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from random_model import SHIPPED_MODEL

from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.model_config.config import read_model_config

PARTS = {"checkpoints": "checkpoints", "exit_heads": "artifact", "cache": "token cache"}
"""Folder -> its name in the table. All else is the log, its plots and what is temporary."""


def main() -> int:
    """Tunes, and prints the table. Returns the exit code of the tuner where it fails."""
    options = _options()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        texts = options.data or _texts(folder.with_name(f"{folder.name}_texts.jsonl"))
        (folder / "tmp").mkdir()
        peak = _tune(options, texts, folder)
        if options.data is None:
            texts.unlink()
    if isinstance(peak, int):
        return peak
    model = read_model_config(options.model)
    tokens = options.steps * options.batch * options.seq_length
    states = tokens * 4 * model.hidden_size * (4 if options.dtype == "float32" else 2)
    print(f"{tokens:,} tokens in {options.steps} steps, {options.dtype}, hidden size {model.hidden_size}\n")
    print("| disk at its largest | MB |\n|---|---|")
    for part in (*PARTS.values(), "log, plots and temporary files"):
        print(f"| {part} | {peak[part] / 1e6:,.1f} |")
    print(f"| all | {peak.total() / 1e6:,.1f} |\n| hidden states, if they were written | {states / 1e6:,.1f} |")
    print(f"\nmemory at its highest: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:,.2f} GB")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--data", type=Path, help="default: Python's documentation")
    parser.add_argument("--output-vocab", type=int, default=0, help="tokens of the head's list (default: all)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def _texts(path: Path) -> Path:
    lines = [json.dumps({"text": text}) for text in documentation_strings(sample_corpus()[0])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _tune(options: argparse.Namespace, texts: Path, folder: Path) -> "Counter[str] | int":
    """Returns the bytes of each part when all together were the most, or the exit code of a run that failed."""
    words = ["--model", options.model, "--architecture", "eagle3", "--loss", "lk", "--data", texts]
    words += ["--train-iters", options.steps, "--seq-length", options.seq_length, "--dtype", options.dtype]
    words += ["--micro-batch-size", options.batch, "--global-batch-size", options.batch]
    words += ["--output-vocab", options.output_vocab]
    words += ["--set", f"data.cache={folder / 'cache'}", "--set", f"tuning.save_interval={max(1, options.steps // 4)}"]
    command = [sys.executable, "-m", "ee_tuning", "tune", *map(str, words), "--output", str(folder / "run")]
    peak = Counter[str]()
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder / "tmp")}) as process:
        while process.poll() is None:
            sizes = _sizes(folder)
            peak = sizes if sizes.total() > peak.total() else peak
            time.sleep(0.2)
    return process.returncode or peak


def _sizes(folder: Path) -> Counter[str]:
    sizes = Counter[str]()
    for path in folder.rglob("*"):
        part = next((name for mark, name in PARTS.items() if mark in path.parts), "log, plots and temporary files")
        try:
            sizes[part] += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:  # gone since it was listed
            continue
    return sizes


if __name__ == "__main__":
    sys.exit(main())
