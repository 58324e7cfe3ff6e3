"""The time that the stages of a tuning run wait for each other.

    python benchmarks/relay.py
    python benchmarks/relay.py --steps 100 --milliseconds 50 --stages 4

The real tuner, its metrics on, on as many processes as there are stages, with 2 micro-batches a step and an exit on
every stage. The work of a stage is simulated: the layers of a micro-batch, and the losses of its exits, are made to
last equally long on every stage by sleeping, so that the figures depend on the relay and not on the number of
processors. Idle is 1 - work / (last work's end - first work's begin), of the worst stage. A run whose stages wait for
the last one at the end of every step, as is usual, is there to compare.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from random_model import SHIPPED_MODEL
from rank_processes import run_ranks
from working_time import Clock, DrainingWork

from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.losses.teacher_channel import TeacherChannel
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning import exit_trainer
from ee_tuning.tuning import tuner as tuner_module
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.tuner import Tuner

SEQ_LENGTH = 16
WAYS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "cross-entropy": (0.05, {}),
    "distillation": (0.08, {"tuning.loss": ["forward_kl"]}),
    "distillation, hidden states": (0.08, {"tuning.loss": ["forward_kl"], "tuning.teacher": "hidden"}),
    "cross-entropy, drained at every step": (None, {}),
}
"""Way -> largest idle share to reach, and its keys of the config."""


def main() -> None:
    """Measures every way and prints the table."""
    options = _options()
    rows = {}
    for way in WAYS:
        seconds, shares, told = measure(way, options)
        rows[way] = {"seconds": seconds, "idle": shares, "told": told}
    print(
        f"\n{options.stages} stages, {options.steps} steps of 2 micro-batches, {options.milliseconds:g} ms for the layers and as many "
        "for the losses of a micro-batch on each stage\n"
    )
    print("| run | seconds | idle, by stage | worst | told by metrics.jsonl | goal | met |")
    print("|---|---|---|---|---|---|---|")
    for way, row in rows.items():
        goal, worst = WAYS[way][0], max(row["idle"])
        shares = ", ".join(f"{share:.1%}" for share in row["idle"])
        print(
            f"| {way} | {row['seconds']:.1f} | {shares} | {worst:.1%} | {row['told']:.1%} | "
            + (" | |" if goal is None else f"< {goal:.0%} | {'yes' if worst < goal else 'no'} |")
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--milliseconds", type=float, default=50)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def measure(way: str, options: argparse.Namespace) -> tuple[float, list[float], float]:
    """Returns the seconds, the idle share of every stage, and the largest mean in the run's own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(
            options.stages, _timed_run, way, _config(way, Path(folder, "run"), options), options.milliseconds / 1e3
        )
        records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    told = [record["idle_share"] for record in records if record["kind"] == "train"]
    mean_metrics = [sum(each[stage] for each in told) / len(told) for stage in told[0]]
    return max(seconds for seconds, _ in results), [share for _, share in results], max(mean_metrics)


def _config(way: str, folder: Path, options: argparse.Namespace) -> Config:
    folder.mkdir()
    return load_config(
        None,
        {
            "model.path": str(SHIPPED_MODEL),
            "exits.exit_layers": list(range(1, 13)),
            "exits.architecture": "norm",
            "exits.output": "tied",
            "parallel.pipeline_model_parallel_size": options.stages,
            "tuning.run_folder": str(folder),
            "tuning.train_iters": options.steps,
            "tuning.seq_length": SEQ_LENGTH,
            "tuning.micro_batch_size": 1,
            "tuning.global_batch_size": 2,
            "tuning.eval_iters": 0,
            "tuning.save_interval": 0,
            "tuning.teacher": "top_k",
            **WAYS[way][1],
        },
    )


def _timed_run(way: str, config: Config, seconds: float) -> tuple[float, float]:
    """Returns the seconds of this stage, and its idle share."""
    topology, clock = init_parallel(config.parallel), Clock()
    tokens = np.random.RandomState(5).randint(0, 200, 50 * SEQ_LENGTH + 1).astype(np.int32)
    samples = Splits(train=PackedSamples(tokens, SEQ_LENGTH), valid=None)
    with ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        if way.endswith("drained at every step"):
            replace(tuner_module, "ExitTrainer", DrainingWork)
        tuner = Tuner(load_for_tuning(config, topology), samples, config, topology)
        model = tuner._model
        replace(model, "run_layers", clock.timed(model.run_layers, seconds))
        replace(exit_trainer.ExitTrainer, "train", clock.timed(exit_trainer.ExitTrainer.train, seconds))
        replace(TeacherChannel, "publish", clock.timed(TeacherChannel.publish))
        replace(exit_trainer, "update_exits", clock.timed(exit_trainer.update_exits))
        replace(Saver, "save", lambda *_, **__: None)
        topology.barrier()
        tuner.run()
    return clock.elapsed, clock.idle_share


if __name__ == "__main__":
    main()
