"""The overhead of a tuning step over its necessary arithmetic.

    python benchmarks/tuning_step.py
    python benchmarks/tuning_step.py --threads 1 --steps 30 --seq-length 512 --json tuning_step.json

A step of the real tuner, in one process: data, frozen layers, exits forward and backward, clip, optimizer, metrics. It
is divided by the bare work: embedding and the same layers under no_grad, then each head's forward and backward, called
directly on plain copies of the heads, over as many micro-batches. The two alternate, so that a slow moment of the
machine falls on both; the ratio is the median over the steps of the step's own ratio. For the shipped model and a
random one of 30M parameters.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_model import EXIT_LAYERS, SHIPPED_MODEL, num_parameters, write_random_model

from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.data.loader import BatchSource
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokens import Splits
from ee_tuning.losses.loss import linear_loss
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitHead
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning import exit_trainer
from ee_tuning.tuning.exit_trainer import ExitTrainer
from ee_tuning.tuning.tuner import Tuner

GOAL = 1.10
TEXTS = Path(__file__).parents[1] / "ee_tuning"


@dataclass
class Seconds:
    """Seconds of one step."""

    step: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    layers: float = 0.0
    """The bare work: embedding and frozen layers."""
    heads: float = 0.0
    """The bare work: heads forward and backward."""

    @property
    def bare(self) -> float:
        """All of the bare work."""
        return self.layers + self.heads


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model's figures, medians over the steps."""

    model: str
    million_parameters: float
    seconds: Seconds
    ratio: float


def main() -> None:
    """Measures both models and prints the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Callable[[], Path]] = {
            "shipped": lambda: options.model,
            "30M": lambda: write_random_model(Path(folder, "30m"), options.model).model,
        }
        for name in options.only or models:
            print(f"{name}: {options.steps} steps", file=sys.stderr, flush=True)
            results.append(measure(name, models[name](), Path(folder, "runs", name), options))
    _print_table(results, options)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="the shipped model; its tokenizer serves the random one too"
    )
    parser.add_argument("--only", nargs="+", choices=["shipped", "30M"])
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed, after two that are not")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def measure(name: str, model: Path, run_folder: Path, options: argparse.Namespace) -> Result:
    """Measures one model."""
    warm_up = 2
    config = load_config(
        None,
        {
            "model.path": str(model),
            "exits.exit_layers": list(EXIT_LAYERS),
            "data.paths": [str(TEXTS)],
            "data.tokenizer": str(model),
            "tuning.run_folder": str(run_folder),
            "tuning.train_iters": options.steps + warm_up,
            "tuning.seq_length": options.seq_length,
            "tuning.micro_batch_size": options.micro_batch_size,
            "tuning.global_batch_size": options.global_batch_size,
            "tuning.eval_iters": 0,
            "tuning.eval_interval": 0,
            "tuning.save_interval": 0,
        },
    )
    tuner = TimedTuner(config)
    with tuner.timed():
        tuner.run()
    taken = tuner.taken[warm_up:]
    medians = Seconds(
        **{field: statistics.median(getattr(each, field) for each in taken) for field in asdict(taken[0])}
    )
    return Result(
        model=name,
        million_parameters=num_parameters(model) / 1e6,
        seconds=medians,
        ratio=statistics.median(each.step / each.bare for each in taken),
    )


class TimedTuner(Tuner):
    """The tuner, timing each step and doing the bare work once after it. `taken` holds the seconds of every step."""

    def __init__(self, config: Config) -> None:
        topology, tuning = init_parallel(config.parallel), config.tuning
        Path(tuning.run_folder).mkdir(parents=True)
        shape = read_model_config(Path(config.model.path))
        samples = load_samples(
            config.data,
            config.model.path,
            seq_length=tuning.seq_length,
            vocab_size=shape.vocab_size,
            max_positions=shape.max_position_embeddings,
            needs_validation=False,
        )
        loaded = load_for_tuning(config, topology)
        self.bare = BareWork(loaded.model, samples, config)  # before the tuner shards the heads
        super().__init__(loaded, samples, config, topology)
        self.taken: list[Seconds] = []
        self._began: float | None = None
        self._source = TimedSource(self._source, self._note_data)  # type: ignore[assignment]

    def _note_data(self, seconds: float) -> None:
        if self._began is None:  # the first micro-batch of a step
            self._began = time.perf_counter() - seconds
            self.taken.append(Seconds())
        self.taken[-1].data += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times steps within the block, with clip and optimizer."""
        update_exits, end_step = exit_trainer.update_exits, ExitTrainer.end_step

        def timed_update(*arguments: Any) -> Any:
            began = time.perf_counter()
            updates = update_exits(*arguments)
            self.taken[-1].optimizer += time.perf_counter() - began
            return updates

        def timed_end(*arguments: Any) -> None:
            end_step(*arguments)
            assert self._began is not None
            self.taken[-1].step, self._began = time.perf_counter() - self._began, None
            self.taken[-1].layers, self.taken[-1].heads = self.bare.do()

        with (
            mock.patch.object(exit_trainer, "update_exits", timed_update),
            mock.patch.object(ExitTrainer, "end_step", timed_end),
        ):
            yield


class TimedSource:
    """A source of batches that records the time of each."""

    def __init__(self, source: BatchSource, note: Callable[[float], None]) -> None:
        self._source, self._note = source, note

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self._source)
        self._note(time.perf_counter() - began)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class BareWork:
    """The arithmetic of a step: the model's own frozen layers, and heads that are plain modules with the same
    weights.
    """

    def __init__(self, model: EarlyExitModel, samples: Splits, config: Config) -> None:
        source = BatchSource(samples.train, config.tuning, dp=1, dp_rank=0)
        self._model, self._batches = model, [next(source) for _ in range(source.num_microbatches)]
        self._project = partial(linear_loss, vocab=model.vocab, chunk_tokens=config.tuning.loss_chunk_tokens)
        self._heads = {spec.layer: _copy(model.exit_head(spec.layer), model) for spec in model.plan.own_exits}

    def do(self) -> tuple[float, float]:
        """Does the work once. Returns the seconds of the layers, and of the heads."""
        layers = heads = 0.0
        for batch in self._batches:
            began = time.perf_counter()
            _, inputs = self._model.run_layers(self._model.embed(batch.tokens))
            between = time.perf_counter()
            for layer, head in self._heads.items():
                project = partial(self._project, labels=batch.labels, loss_mask=batch.loss_mask)
                head(inputs[layer], project).loss.backward()
            layers, heads = layers + between - began, heads + time.perf_counter() - between
        for head in self._heads.values():
            head.zero_grad()
        return layers, heads


def _copy(head: ExitHead, model: EarlyExitModel) -> ExitHead:
    own = type(head)(
        head.spec, model.config, model.topology, dtype=model.plan.dtype, tied_weight=None, angles=model.backbone.angles
    )
    own.load_state_dict(head.state_dict())
    return own


def _print_table(results: list[Result], options: argparse.Namespace) -> None:
    print(
        f"\n{options.global_batch_size} sequences of {options.seq_length} tokens a step, micro-batches of {options.micro_batch_size}, "
        f"`mlp` exits after {', '.join(map(str, EXIT_LAYERS))}, float32, {options.threads} thread(s), medians of {options.steps} steps\n"
    )
    print(
        "| model | step | layers alone | heads alone | optimizer's share | data's share | step ÷ (layers + heads) | goal | met |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        s = r.seconds
        print(
            f"| {r.model} ({r.million_parameters:.1f}M) | {s.step * 1e3:.0f} ms | {s.layers * 1e3:.0f} ms | {s.heads * 1e3:.0f} ms | "
            f"{s.optimizer / s.step:.1%} | {s.data / s.step:.1%} | {r.ratio:.3f} | ≤ {GOAL} | {'yes' if r.ratio <= GOAL else 'no'} |"
        )


if __name__ == "__main__":
    main()
