"""The time that a checkpoint costs a training run: written in the background, and waited for.

    python benchmarks/saving.py
    python benchmarks/saving.py --hidden-size 1024 --steps 48 --interval 12

A run of the real tuner on two processes, one stage each with an untied `norm` exit, over a random Llama. A checkpoint
has the exits' float32 masters and Adam's two moments, 12 bytes a parameter. The boundary is the time that a step's end
takes longer for its checkpoint, of the slower process; the additional time of the run, compared with one that saves
only at its end, is the cost of the writing itself.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from random_model import SHIPPED_MODEL, write_random_model
from rank_processes import run_ranks

from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.tuner import Tuner

SEQ_LENGTH, VOCABULARY = 64, 32000


def main() -> None:
    """Measures each way and prints the table."""
    options = _options()
    ways: dict[str, dict[str, Any]] = {
        "at the end alone": {"tuning.save_interval": 0},
        "beside training": {},
        "waited for": {"tuning.async_save": False},
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "hidden_size": options.hidden_size,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
        }
        model = write_random_model(Path(folder), SHIPPED_MODEL, (1,), **sizes).model
        print(
            f"{12 * VOCABULARY * options.hidden_size / 1e6:.0f} MB a process, {options.steps} steps, a checkpoint every "
            f"{options.interval}\n\n| checkpoints | boundary, median | longest | run |\n|---|---|---|---|",
            flush=True,
        )
        for way, keys in ways.items():
            config = load_config(
                None,
                {
                    "model.path": str(model),
                    "exits.exit_layers": [2, 4],
                    "exits.architecture": "norm",
                    "parallel.pipeline_model_parallel_size": 2,
                    "tuning.run_folder": str(Path(folder, way)),
                    "tuning.train_iters": options.steps,
                    "tuning.seq_length": SEQ_LENGTH,
                    "tuning.micro_batch_size": 1,
                    "tuning.global_batch_size": 2,
                    "tuning.eval_iters": 0,
                    "tuning.save_interval": options.interval,
                    **keys,
                },
            )
            results = run_ranks(2, _seconds_of_saves, config)
            boundaries = [
                max(of_ranks) for of_ranks in zip(*(saves[:-1] for saves, _ in results), strict=True)
            ]  # the end waits in any case
            told = (
                ["", ""]
                if not boundaries
                else [f"{1e3 * each:.0f} ms" for each in (statistics.median(boundaries), max(boundaries))]
            )
            print(f"| {way} | {told[0]} | {told[1]} | {max(seconds for _, seconds in results):.1f} s |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--interval", type=int, default=10, help="steps from one checkpoint to the next")
    return parser.parse_args()


def _seconds_of_saves(config: Config) -> tuple[list[float], float]:
    """Returns the seconds of every save, and of the run, of this process."""
    topology = init_parallel(config.parallel)
    Path(config.tuning.run_folder).mkdir(exist_ok=True)
    tokens = np.random.RandomState(5).randint(0, VOCABULARY, 50 * SEQ_LENGTH + 1).astype(np.int32)
    tuner = Tuner(
        load_for_tuning(config, topology), Splits(train=PackedSamples(tokens, SEQ_LENGTH), valid=None), config, topology
    )
    save, saves = tuner._save, []

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        save(*args)
        saves.append(time.perf_counter() - began)

    topology.barrier()
    began = time.perf_counter()
    with mock.patch.object(tuner, "_save", timed):
        tuner.run()
    return saves, time.perf_counter() - began


if __name__ == "__main__":
    main()
