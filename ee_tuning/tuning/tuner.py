"""Tuning: exit heads are trained on a frozen backbone, in a forward-only relay of micro-batches that never drains but for checkpoints.

`ee-tuning tune job.yaml` in one process, `torchrun --nproc-per-node N -m ee_tuning tune job.yaml` in many.
"""
import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.checkpoint.aside import on_first_rank
from ee_tuning.checkpoint.exit_config import exit_config_tree
from ee_tuning.checkpoint.exit_heads import save_exit_heads
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.checkpoint.load import LoadedModel, load_for_tuning
from ee_tuning.config import Config
from ee_tuning.data.loader import BatchSource, count_microbatches, validation_batches
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokens import Splits
from ee_tuning.parallel.relay import Relay
from ee_tuning.parallel.topology import Topology, init_parallel, leave_parallel
from ee_tuning.tuning.metrics import METRICS, MetricsBoard, MetricsFile, Record, holds_validation
from ee_tuning.tuning.optimizer import ExitOptimizer, ExitUpdate, update_exits
from ee_tuning.tuning.progress import ProgressDisplay
from ee_tuning.tuning.run_folder import EXIT_HEADS, check_run_folder, open_run_folder
from ee_tuning.tuning.schedule import learning_rate
from ee_tuning.tuning.settings import check_settings, loss_weights
from ee_tuning.tuning.state import Progress, latest_checkpoint, load_checkpoint, save_checkpoint, whole_tensors
from ee_tuning.tuning.step import StageWalk
from ee_tuning.tuning.stopping import StopRequest


def tune(config: Config) -> None:
    """Tunes the exits that `config` describes, into its run folder. Raises InputError where something given can not be used."""
    topology = init_parallel(config.parallel)
    tune_within(config, topology)
    leave_parallel()


def tune_within(config: Config, topology: Topology) -> None:
    """As `tune`, within a world that exists."""
    check_settings(config.tuning)
    count_microbatches(config.tuning, topology.dp)
    check_run_folder(config, topology)
    samples = _load_samples(config, topology)
    loaded = load_for_tuning(config, topology)
    tuner = Tuner(loaded, samples, config, topology)
    if config.tuning.resume:
        tuner.resume()
    open_run_folder(config, topology)  # only now: a job that was refused leaves nothing, and a good run its config.yaml
    is_finished = tuner.run()
    if is_finished:
        output = tuner.run_folder / EXIT_HEADS
        tuner.save_exit_heads(output)
        if topology.is_logging_rank:
            print(f"wrote {output}\nnext: ee-tuning generate --model {quote(config.model.path)} "
                  f"--exits {quote(str(output))} --threshold 0.8 --show-exits --prompt \"…\"")


class Tuner:
    """One stage's part of a run. `step` counts the optimizer steps taken."""

    def __init__(self, loaded: LoadedModel, samples: Splits, config: Config, topology: Topology) -> None:
        assert loaded.exits is not None
        self.tuning, self.topology, self.exits_config = config.tuning, topology, loaded.exits
        self.run_folder = Path(config.tuning.run_folder)
        self.step = 0
        self._model = loaded.model
        weights = loss_weights(self.tuning, loaded.exits.exit_layers)
        self.exits = [ExitOptimizer(loaded.model.exit_head(spec.layer), weights[spec.layer], self.tuning, topology)
                      for spec in loaded.model.plan.own_exits]
        self._samples = samples
        self._source = BatchSource(samples.train, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)
        self._validation = validation_batches(samples.valid, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)

    def resume(self) -> None:
        """Goes on from the run folder's latest checkpoint, if there is one. Raises InputError where it is of another run."""
        folder = on_first_rank(self.topology, lambda: latest_checkpoint(self.run_folder))
        if folder is None:
            return
        progress = load_checkpoint(folder, self._fixed(), self.exits, self._model.config, self.topology)
        self.step = progress.step
        self._source = BatchSource(self._samples.train, self.tuning, dp=self.topology.dp, dp_rank=self.topology.dp_rank,
                                   position=progress.position)

    def run(self) -> bool:
        """Steps until train_iters or a signal, saves a checkpoint, and says whether train_iters was reached."""
        num_steps = self.tuning.train_iters
        if self.step >= num_steps:
            return True
        shape = (self.tuning.seq_length, self.tuning.micro_batch_size, self._model.config.hidden_size)
        relay = Relay(self.topology, shape, self._model.plan.dtype)
        walk = StageWalk(self._model, relay, self.topology, self.tuning.loss_chunk_tokens)
        validates_first = self._validates_first()
        with self._metrics() as metrics, StopRequest() as stop:
            pace = _Pace(self.tuning.global_batch_size * self.tuning.seq_length)
            if validates_first:
                self._validate(walk, metrics)
            more = True
            while more:
                pace.resume()
                more = self._train_step(walk, stop, metrics, pace)
                if more and self._validates_after(self.step):
                    pace.pause()
                    more = self._validate(walk, metrics)
                if more and self._saves_after(self.step):
                    pace.pause()
                    self._save(relay, metrics)
                metrics.poll()
            self._save(relay, metrics)
        return self.step == num_steps

    def rehearse(self, walk: StageWalk) -> None:
        """One optimizer step and one validation, whose records go nowhere. For dry runs."""
        metrics = MetricsBoard(self.topology, _ignore)
        self._train_step(walk, StopRequest(), metrics, _Pace(self.tuning.global_batch_size * self.tuning.seq_length))
        self._validate(walk, metrics)

    def save_exit_heads(self, output: Path) -> None:
        """Writes the artifact of the tuned heads, in the backbone's dtype. All ranks call it."""
        settings = ("global_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style", "seed")
        tuned = {"steps": self.step, "tokens": self._source.position * self.tuning.seq_length,
                 **{key: getattr(self.tuning, key) for key in settings}}
        save_exit_heads(output, dataclasses.replace(self.exits_config, tuned=tuned), self._model.config,
                        whole_tensors(self.exits, self._model.config, self.topology), self.topology, overwrite=True)

    def _train_step(self, walk: StageWalk, stop: StopRequest, metrics: MetricsBoard, pace: "_Pace") -> bool:
        """One optimizer step of every exit here. Whether the run goes on."""
        trained = [each for each in self.exits if each.trains]
        loss_sums: dict[int, Tensor] = {}
        num_tokens = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        step, num_microbatches, more = self.step + 1, self._source.num_microbatches, True
        ends_in_save = self._saves_after(step) and not self._validates_after(step)
        for index in range(num_microbatches):
            batch, is_last = next(self._source), index == num_microbatches - 1
            if is_last and self.topology.is_first_stage:
                more = self._follows(step, stop)
            exit_inputs, more = walk.forward(batch, more, ahead=not (is_last and ends_in_save))
            _add(loss_sums, walk.train(batch, exit_inputs, trained, is_last))
            del exit_inputs  # else they would lie beside the next micro-batch's
            num_tokens += batch.loss_mask.sum()
        lr = learning_rate(step, self.tuning)
        updates = update_exits(trained, loss_sums, num_tokens, lr, self.topology) if trained else {}
        self.step = step
        pace.count()
        if step % self.tuning.log_interval == 0 or not more or step == self.tuning.train_iters:
            metrics.post(_train_record(step, lr, updates, pace.tokens_per_second()))
        return more

    def _follows(self, step: int, stop: StopRequest) -> bool:
        """On the first stage: whether a micro-batch follows those of `step`. All its ranks call it once a step."""
        if step == self.tuning.train_iters:  # the end is near enough
            return bool(self._validation)
        return not stop.agreed(self.topology)

    def _validates_first(self) -> bool:
        """Whether a validation comes before the next step: of the heads as they began, or one that a stop left out. All ranks call it."""
        if self.step == 0:
            return bool(self._validation)
        return self._validates_after(self.step) and not on_first_rank(
            self.topology, lambda: holds_validation(self.run_folder / METRICS, self.step))

    def _saves_after(self, step: int) -> bool:
        return bool(self.tuning.save_interval and step % self.tuning.save_interval == 0)

    def _validates_after(self, step: int) -> bool:
        interval = self.tuning.eval_interval
        return bool(self._validation) and (step == self.tuning.train_iters or bool(interval and step % interval == 0))

    def _validate(self, walk: StageWalk, metrics: MetricsBoard) -> bool:
        """Mean loss of every exit over the validation micro-batches, which go down the relay. Whether the run goes on."""
        loss_sums: dict[int, Tensor] = {}
        num_tokens, more = torch.zeros((), dtype=torch.float64, device=self.topology.device), True
        for index, batch in enumerate(self._validation):
            is_last = index == len(self._validation) - 1
            exit_inputs, more = walk.forward(batch, more=not (is_last and self.step == self.tuning.train_iters),
                                             ahead=not (is_last and self._saves_after(self.step)))
            _add(loss_sums, walk.evaluate(batch, exit_inputs, self.exits))
            del exit_inputs
            num_tokens += batch.loss_mask.sum()
        for each in self.exits:
            each.reshard()
        total, *sums = self._summed_over_replicas([num_tokens, *loss_sums.values()]) if self.exits else [0.0]
        losses = {str(layer): value / total if total else math.nan for layer, value in zip(loss_sums, sums, strict=True)}
        metrics.post({"kind": "validation", "step": self.step, "loss": losses})
        return more

    def _summed_over_replicas(self, values: list[Tensor]) -> list[float]:
        stacked = torch.stack([value.double() for value in values])
        if self.topology.dp > 1:
            dist.all_reduce(stacked, group=self.topology.dp_group)
        return stacked.tolist()

    def _save(self, relay: Relay, metrics: MetricsBoard) -> None:
        relay.finish()
        assert relay.is_quiet, "saving waits for the device, and the device would wait for a micro-batch that comes after the save"
        metrics.finish()  # so that a run that goes on from here has the records of all steps before it
        progress = Progress(step=self.step, position=self._source.position, fixed=self._fixed())
        save_checkpoint(self.run_folder, progress, self.exits, self._model.config, self.topology, self.tuning.keep_checkpoints)

    def _fixed(self) -> dict[str, Any]:
        exits = self.exits_config
        return {"model_fingerprint": exits.model_fingerprint, "exit_layers": list(exits.exit_layers),
                "architecture": exit_config_tree(exits)["architecture"], "adapter_rank": exits.adapter_rank,
                "output": exits.output, "seq_length": self.tuning.seq_length, "seed": self.tuning.seed,
                **self._samples.train.identity()}

    @contextmanager
    def _metrics(self) -> Iterator[MetricsBoard]:
        """Where this stage posts its metrics; on the logging rank they end in metrics.jsonl, log.txt and before the user's eyes."""
        if not self.topology.is_logging_rank:
            yield MetricsBoard(self.topology, _ignore)
            return
        file = MetricsFile(self.run_folder / METRICS, resume_after=self.step or None)
        with ProgressDisplay(self.run_folder / "log.txt", self.tuning.train_iters, self.step) as display:
            def take(record: Record) -> None:
                file.write(record)
                display.show(record)
            yield MetricsBoard(self.topology, take)
            if self.step < self.tuning.train_iters:
                display.say(f"stopped after step {self.step}; go on with --resume")
        file.close()


class _Pace:
    """Tokens per second of training, validation and checkpoints left out."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step, self._num_steps, self._seconds = tokens_per_step, 0, 0.0
        self._since: float | None = None

    def resume(self) -> None:
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def count(self) -> None:
        self._num_steps += 1

    def tokens_per_second(self) -> float:
        """Since the last call."""
        self.pause()
        rate = self._num_steps * self._tokens_per_step / max(self._seconds, 1e-9)
        self._num_steps, self._seconds = 0, 0.0
        self.resume()
        return rate


def _load_samples(config: Config, topology: Topology) -> Splits:
    source, model, _ = open_model(config.model)
    with source:
        folder = source.folder
    return load_samples(config.data, folder, seq_length=config.tuning.seq_length, vocab_size=model.vocab_size,
                        max_positions=model.max_position_embeddings, needs_validation=config.tuning.eval_iters > 0, topology=topology)


def _train_record(step: int, lr: float, updates: dict[int, ExitUpdate], tokens_per_second: float) -> Record:
    return {"kind": "train", "step": step, "lr": lr, "loss": {str(layer): update.loss for layer, update in updates.items()},
            "grad_norm": {str(layer): update.grad_norm for layer, update in updates.items()}, "tokens_per_second": tokens_per_second}


def _add(sums: dict[int, Tensor], losses: dict[int, Tensor]) -> None:
    for layer, loss in losses.items():
        sums[layer] = sums[layer] + loss.double() if layer in sums else loss.double()


def _ignore(record: Record) -> None:
    """Records are taken on the logging rank."""
